//! `warren operator ...`

use std::time::Duration;

use clap::Subcommand;
use warren_manifest::parse;
use warren_proto::v1;

use crate::{
    client::{ClientArguments, all_pages},
    error::Error,
    filter::ListArguments,
    output::{self, FormatArguments, say},
};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Create an operator, and print the command to log in with.
    ///
    /// The command contains a token that is valid for one login. An operator has the permissions of root at a manager's
    /// socket.
    Create {
        /// Unique name of the operator; events record it.
        name: String,
        /// Validity of the login token, like 2h [default: a day]
        #[arg(long, value_parser = parse::duration)]
        lifetime: Option<pbjson_types::Duration>,
        #[command(flatten)]
        format: FormatArguments,
    },
    /// List operators.
    #[command(alias = "list")]
    Ls {
        #[command(flatten)]
        list: ListArguments,
    },
    /// Remove operators and revoke their certificates.
    Rm {
        /// Names, IDs or unique ID prefixes.
        #[arg(required = true)]
        operators: Vec<String>,
    },
}

pub(crate) async fn run(command: Command, client: &ClientArguments) -> Result<(), Error> {
    let mut api = client.operators().await?;
    match command {
        Command::Create { name, lifetime, format } => {
            let made = api.create_operator(v1::CreateOperatorRequest { name, lifetime }).await?.into_inner();
            if output::to_program(format.format, &made)? {
                return Ok(());
            }
            let manager = made.managers.first().map_or("HOST:7443", String::as_str);
            say!("warren login --token {} {manager}", made.token);
        }
        Command::Ls { list } => {
            let operators = all_pages(async |page_token| {
                let page =
                    api.list_operators(v1::ListOperatorsRequest { page_size: 0, page_token }).await?.into_inner();
                Ok((page.operators, page.next_page_token))
            })
            .await?;
            let operators = list.apply(operators)?;
            if output::to_program(list.format(), &operators)? {
                return Ok(());
            }
            let rows = operators.iter().map(|operator| {
                let since = output::ago(operator.created_at.as_ref());
                [output::short(&operator.id), operator.name.clone(), status(operator), since]
            });
            output::table(["ID", "NAME", "STATUS", "CREATED"], rows);
        }
        Command::Rm { operators } => {
            let mut outcome = Ok(());
            for operator in operators {
                match api.delete_operator(v1::DeleteOperatorRequest { operator: operator.clone() }).await {
                    Ok(_) => say!("{operator}"),
                    Err(status) => outcome = outcome.and(Err(status.into())),
                }
            }
            return outcome;
        }
    }
    Ok(())
}

fn status(operator: &v1::Operator) -> String {
    match output::left(operator.invited_until.as_ref()) {
        None => "has logged in".to_owned(),
        Some(Duration::ZERO) => "the invitation has run out".to_owned(),
        Some(left) => format!("invited for {}", output::coarse(left)),
    }
}
