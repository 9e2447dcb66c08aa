//! `warren events`

use std::time::{Duration, Instant};

use clap::Args;
use tonic::Code;
use warren_proto::v1;

use crate::{
    client::ClientArguments,
    error::Error,
    output::{self, Format, FormatArguments, say},
};

#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// Follow new events.
    #[arg(long, short)]
    follow: bool,
    /// Only events whose type has this prefix, like service, node.down or container.failed; may be repeated.
    #[arg(long = "type", value_name = "TYPE")]
    types: Vec<String>,
    /// Only events after this revision.
    #[arg(long, value_name = "REVISION", default_value_t = 0)]
    since: u64,
    /// Number of past events to show; 0 with --follow shows only new events.
    #[arg(long, short = 'n', value_name = "EVENTS")]
    tail: Option<u32>,
    #[command(flatten)]
    format: FormatArguments,
}

/// So long somebody who follows waits for another leader, or for a manager that is started again.
const PATIENCE: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(500);

pub(crate) async fn run(arguments: Arguments, client: &ClientArguments) -> Result<(), Error> {
    let mut request = v1::StreamEventsRequest {
        event_types: arguments.types,
        follow: arguments.follow,
        since_revision: arguments.since,
        tail: arguments.tail,
    };
    // From where to go on, if nobody can be followed before the first event.
    let mut first = 0;
    if request.follow && request.tail.is_some() {
        let info = client.cluster().await?.get_cluster_info(v1::GetClusterInfoRequest {}).await?;
        first = info.get_ref().applied_index;
    }
    let mut lost: Option<Instant> = None;
    loop {
        match show(client, &mut request, first, arguments.format.format, &mut lost).await {
            Err(error) if request.follow && lost.is_some_and(|lost| lost.elapsed() < PATIENCE) && is_away(&error) => {
                tokio::time::sleep(PAUSE).await;
            }
            ended => return ended,
        }
    }
}

/// Shows events until their end.
async fn show(
    client: &ClientArguments,
    request: &mut v1::StreamEventsRequest,
    first: u64,
    format: Format,
    lost: &mut Option<Instant>,
) -> Result<(), Error> {
    let mut events = client.events().await?.stream_events(request.clone()).await?.into_inner();
    (request.since_revision, request.tail) = (request.since_revision.max(first), None);
    if lost.take().is_some() {
        eprintln!("another manager is followed: what became of containers and nodes in between is not told");
    }
    loop {
        let message = events.message().await;
        if message.is_err() {
            *lost = Some(Instant::now());
        }
        let Some(response) = message? else { return Ok(()) };
        let event = response.event.unwrap_or_default();
        request.since_revision = request.since_revision.max(event.revision);
        if !output::next_to_program(format, &event)? {
            line(&event);
        }
    }
}

/// Whether somebody else may answer, or the same manager later.
fn is_away(error: &Error) -> bool {
    match error {
        Error::Refused(status) => status.code() == Code::Unavailable,
        error => matches!(error, Error::NoManager { .. } | Error::Unreachable { .. } | Error::Broken { .. }),
    }
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
    say!("{at}  {:22} {:24} {}", output::printable(&event.r#type), output::printable(&name), output::printable(&words));
}
