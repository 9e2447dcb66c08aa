//! `warren events`

use clap::Args;
use warren_proto::v1;

use crate::{
    client::ClientArguments,
    error::Error,
    output::{self, FormatArguments, say},
};

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// Go on with what happens.
    #[arg(long, short)]
    follow: bool,
    /// Only types that begin like this: service, node.down, container.failed; may be repeated.
    #[arg(long = "type", value_name = "TYPE")]
    types: Vec<String>,
    /// Only what came after this revision.
    #[arg(long, value_name = "REVISION", default_value_t = 0)]
    since: u64,
    /// Of what has happened, only so many, the latest; with --follow, 0 shows only what happens from now on.
    #[arg(long, short = 'n', value_name = "EVENTS")]
    tail: Option<u32>,
    #[command(flatten)]
    format: FormatArguments,
}

pub(crate) async fn run(arguments: Arguments, client: &ClientArguments) -> Result<(), Error> {
    let request = v1::StreamEventsRequest {
        event_types: arguments.types,
        follow: arguments.follow,
        since_revision: arguments.since,
        tail: arguments.tail,
    };
    let mut events = client.events().await?.stream_events(request).await?.into_inner();
    while let Some(response) = events.message().await? {
        let event = response.event.unwrap_or_default();
        if !output::next_to_program(arguments.format.format, &event)? {
            line(&event);
        }
    }
    Ok(())
}

fn line(event: &v1::Event) {
    let at = event.at.as_ref().map(output::time).unwrap_or_default();
    let name = match (event.object_name.as_str(), event.object_id.as_str()) {
        // By which it is named to `cluster rm`; several may be on one machine.
        (name, id) if event.r#type.starts_with("manager.") => format!("{id} ({name})"),
        ("", id) => output::short(id),
        (name, _) => name.to_owned(),
    };
    let by = match &event.actor {
        None => String::new(),
        Some(v1::Actor { id, role, address }) => {
            let who = match (role.as_str(), id.as_str()) {
                ("", _) => "a newcomer".to_owned(),
                ("admin", id) => id.to_owned(),
                (role, id) => format!("{role} {}", output::short(id)),
            };
            if address.is_empty() { format!("by {who}") } else { format!("by {who} at {address}") }
        }
    };
    let words = [event.message.as_str(), by.as_str()];
    let words = words.into_iter().filter(|words| !words.is_empty()).collect::<Vec<_>>().join("; ");
    say!("{at}  {:22} {name:24} {words}", event.r#type);
}
