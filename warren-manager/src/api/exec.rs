use std::pin::Pin;

use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming};
use warren_proto::v1::{self, exec_request, exec_server};

use super::{Context, Error, lookup};
use crate::{
    agents::Relay,
    caller::Caller,
    ids::NodeId,
    messages::validate::Invalid,
    state::{ContainerState, State},
};

#[derive(Clone, Debug)]
pub(super) struct Exec(pub(super) Context, pub(super) Relay);

/// What can be known to be wrong before a node is asked.
fn check(start: &v1::ExecStart) -> Result<(), Invalid> {
    if !start.signal.is_empty() {
        return match warren_spec::signal(&start.signal) {
            _ if !start.command.is_empty() => {
                Err(Invalid::new("start.signal", "is for the container, and not for a command"))
            }
            Some(_) => Ok(()),
            None => {
                let why = format!("{:?} is no signal: a name like TERM or SIGTERM, or a number", start.signal);
                Err(Invalid::new("start.signal", why))
            }
        };
    }
    if start.command.first().is_none_or(String::is_empty) {
        return Err(Invalid::new("start.command", "is missing: it is the program and its arguments"));
    }
    if let Some(name) = start.env.keys().find(|name| name.is_empty() || name.contains(['=', '\0'])) {
        return Err(Invalid::new("start.env", format!("{name:?} is no name of a variable")));
    }
    let mut texts = start.command.iter().chain(start.env.values());
    if texts.any(|text| text.contains('\0')) {
        return Err(Invalid::new("start", "neither arguments nor variables may hold a NUL character"));
    }
    if !start.working_dir.is_empty() && !warren_spec::absolute(&start.working_dir) {
        let why = format!("{:?} is not an absolute path", start.working_dir);
        return Err(Invalid::new("start.working_dir", why));
    }
    if !start.user.is_empty() {
        start.user.parse::<warren_spec::User>().map_err(|error| Invalid::new("start.user", error.to_string()))?;
    }
    let too_large = |size: &v1::TerminalSize| size.rows.max(size.columns) > u32::from(u16::MAX);
    if start.terminal.as_ref().is_some_and(too_large) {
        return Err(Invalid::new("start.terminal", "a terminal has at most 65535 rows and columns"));
    }
    Ok(())
}

impl Exec {
    /// Finds the container, and the node that it runs on.
    fn find(state: &State, start: v1::ExecStart) -> Result<(NodeId, v1::ExecStart), Error> {
        let container = lookup::container(state, &start.container)?;
        match &container.node {
            Some(node) if container.status.state == ContainerState::Running => {
                let start = v1::ExecStart { container: container.id.to_string(), ..start };
                Ok((node.clone(), start))
            }
            _ => {
                let why = format!("container {} does not run: it is {}", container.id, container.status.state.name());
                Err(Error::Precondition(why))
            }
        }
    }
}

#[tonic::async_trait]
impl exec_server::Exec for Exec {
    type ExecStream = Pin<Box<dyn Stream<Item = Result<v1::ExecResponse, Status>> + Send>>;

    async fn exec(&self, request: Request<Streaming<v1::ExecRequest>>) -> Result<Response<Self::ExecStream>, Status> {
        let mut requests = request.into_inner();
        let first = requests.message().await?.and_then(|request| request.message);
        let Some(exec_request::Message::Start(start)) = first else {
            let invalid = Invalid::new("start", "is missing: the first message says what to run, and where");
            return Err(Error::from(invalid).into());
        };
        check(&start).map_err(Error::from)?;
        let state = self.0.store.read().await.map_err(super::status)?;
        let (node, start) = Self::find(&state, start)?;
        // Arguments may be anybody's secrets.
        let by = Caller::current().map(|caller| caller.actor().id).unwrap_or_default();
        match start.command.first() {
            Some(program) => {
                tracing::info!(container = start.container, program, by, "a command is run in a container");
            }
            None => {
                tracing::info!(container = start.container, signal = start.signal, by, "a container is sent a signal");
            }
        }
        let wish = v1::ExecWish { id: format!("{:032x}", self.0.environment.random()), start: Some(start) };
        match self.1.exec(node.clone(), wish, requests).await {
            Some(responses) => Ok(Response::new(Box::pin(responses))),
            None => {
                let hostname = state.node(&node).map(|node| node.description.hostname.clone()).unwrap_or_default();
                Err(Status::unavailable(format!("node {hostname} has no session: nothing can be run there")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_run_is_refused_by_field() {
        let good = || v1::ExecStart {
            command: vec!["ls".to_owned()],
            env: [("A".to_owned(), String::new())].into(),
            working_dir: "/srv".to_owned(),
            user: "www-data:33".to_owned(),
            terminal: Some(v1::TerminalSize { rows: 65535, columns: 80 }),
            ..Default::default()
        };
        assert_eq!(check(&good()), Ok(()));
        let refused = |change: fn(&mut v1::ExecStart)| {
            let mut start = good();
            change(&mut start);
            check(&start).expect_err("it is refused").field.into_owned()
        };
        assert_eq!(refused(|start| start.command.clear()), "start.command");
        let signal = |name: &str| check(&v1::ExecStart { signal: name.to_owned(), ..Default::default() });
        assert!(signal("SIGHUP").is_ok() && signal("9").is_ok());
        assert_eq!(signal("NOPE").expect_err("it is refused").field, "start.signal");
        assert_eq!(refused(|start| start.signal = "HUP".to_owned()), "start.signal");
        assert_eq!(refused(|start| start.command[0].clear()), "start.command");
        assert_eq!(refused(|start| start.command.push("a\0b".to_owned())), "start");
        assert_eq!(refused(|start| drop(start.env.insert("A=B".to_owned(), String::new()))), "start.env");
        assert_eq!(refused(|start| drop(start.env.insert("B".to_owned(), "\0".to_owned()))), "start");
        assert_eq!(refused(|start| start.working_dir = "srv".to_owned()), "start.working_dir");
        assert_eq!(refused(|start| start.user = "a b".to_owned()), "start.user");
        assert_eq!(
            refused(|start| start.terminal = Some(v1::TerminalSize { rows: 1, columns: 65536 })),
            "start.terminal"
        );
    }
}
