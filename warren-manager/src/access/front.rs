//! Before the API: who calls, whether they may, and whether it is for the leader to answer.
//!
//! Any manager takes any call. What only the leader knows or may decide is passed on to it with the caller's identity, byte by
//! byte as it comes, streams too: followers need not understand it.

use std::{
    future,
    net::IpAddr,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use futures::{StreamExt as _, future::BoxFuture};
use http::{HeaderMap, HeaderValue, Request, Response};
use http_body::{Body as _, Frame};
use http_body_util::{BodyStream, StreamBody};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Status,
    body::Body,
    transport::{Channel, server::UdsConnectInfo},
};
use tower::{Layer, Service, ServiceExt as _};
use warren_connections::Connections;
use warren_pki::{Identity, Peer, Role};
use warren_proto::{Method, v1::Access};
use warren_raft::Node;

use crate::{
    access::peers::Peers,
    caller::{Caller, ROOT},
    ids::{NodeId, OperatorId},
    state::State,
};

/// Says who called, when one manager passes a call on to another.
const CALLER: &str = "warren-caller";
/// How long a call waits for a leader: an election and a little more.
const LEADER_PATIENCE: Duration = Duration::from_secs(5);

/// How long a follower may take to hear of somebody whom the leader has let in.
const NEWS_PATIENCE: Duration = Duration::from_secs(1);

/// Calls at a time of those who show no certificate, in all and from one client, and how long each may take. The oldest make room for
/// new ones.
const VISITORS: usize = 256;
const VISITORS_OF_ONE: usize = 16;
const VISIT: Duration = Duration::from_secs(20);

/// So long after the members have changed, those who follow something are looked for among them.
const MEMBERS_LOOK: Duration = Duration::from_secs(1);

/// What somebody may do to themselves. These end by themselves.
const REMOVALS: [&str; 2] = ["/warren.v1.Cluster/RemoveManager", "/warren.v1.Operators/DeleteOperator"];

/// Whether somebody may call this. What the API does not have is for operators to be told that it is not there.
fn may(caller: &Caller, path: &str) -> bool {
    let role = caller.role;
    let access = match path {
        "/grpc.health.v1.Health/Check" => Access::Anyone,
        _ if path.starts_with("/grpc.health.v1.Health/") => Access::Members,
        _ if path.starts_with("/grpc.reflection.v1.ServerReflection/") => Access::Members,
        _ => Method::of(path).map_or(Access::Operators, |method| method.access),
    };
    match access {
        Access::Anyone => true,
        Access::Members => role.is_some(),
        Access::Managers => role == Some(Role::Manager),
        Access::Workers => role == Some(Role::Worker) || caller.is_root(),
        Access::Operators | Access::Unspecified => role == Some(Role::Admin),
    }
}

/// Whether every manager answers this itself.
fn is_local(path: &str) -> bool {
    path.starts_with("/grpc.") || Method::of(path).is_some_and(|method| method.local)
}

/// Whether a certificate's owner is still a member.
fn is_member(state: &State, role: Role, id: &str) -> bool {
    match role {
        // A manager that has just joined learns of the others from them.
        Role::Manager if state.cluster().is_none() => true,
        Role::Manager => id.parse().is_ok_and(|id| state.manager(id).is_some()),
        Role::Worker => state.is_admitted(&NodeId::from(id)),
        Role::Admin => state.operator(&OperatorId::from(id)).is_some_and(|operator| operator.invitation.is_none()),
    }
}

/// What stands before the API.
#[derive(Clone, Debug)]
pub(crate) struct Front {
    raft: Node,
    state: watch::Receiver<State>,
    members: watch::Receiver<()>,
    peers: Peers,
    visitors: Connections<IpAddr>,
}

impl Front {
    pub(crate) fn new(raft: Node, state: watch::Receiver<State>, peers: Peers) -> Self {
        let members = follow_members(state.clone());
        Self { raft, state, members, peers, visitors: Connections::new(VISITORS, VISITORS_OF_ONE) }
    }

    /// Whether a manager may have been let in after what this one knows so far, and be the one that it is to learn from.
    fn may_be_news(&self, state: &State, identity: &Identity, path: &str) -> bool {
        path.starts_with("/warren.v1.Raft/")
            && identity.role == Role::Manager
            && !self.raft.status().is_leader
            && identity.id.parse().is_ok_and(|id: u64| id >= state.next_manager())
    }

    /// Waits a little for news of somebody who was let in a moment ago, if this manager may be behind.
    async fn await_news(&self, extensions: &http::Extensions) {
        let identity = extensions.get::<Peer>().and_then(|peer| peer.identity.as_ref());
        let Some(Identity { role: role @ (Role::Worker | Role::Admin), id, .. }) = identity else { return };
        if !self.raft.status().is_leader {
            let mut state = self.state.clone();
            let known = state.wait_for(|state| is_member(state, *role, id));
            // Else it is nobody, as far as can be told here.
            let _ = tokio::time::timeout(NEWS_PATIENCE, known).await;
        }
    }

    /// Who calls, and whether another manager passed it on.
    fn caller(&self, path: &str, extensions: &http::Extensions, headers: &HeaderMap) -> Result<(Caller, bool), Status> {
        if let Some(socket) = extensions.get::<UdsConnectInfo>() {
            // The socket's permissions say the same, but root may have given them away. Who runs the manager can do all of this
            // without asking.
            let own = rustix::process::geteuid().as_raw();
            if socket.peer_cred.is_none_or(|credentials| ![0, own].contains(&credentials.uid())) {
                return Err(Status::permission_denied("only root may use this socket"));
            }
            let own = self.raft.status().id;
            let state = self.state.borrow();
            let hostname = state.manager(own).map(|manager| manager.hostname.clone());
            let address =
                hostname.map_or_else(|| "this machine".to_owned(), |hostname| format!("the socket of {hostname}"));
            return Ok((Caller::new(&state, Some(Role::Admin), ROOT, address), false));
        }
        let peer = extensions.get::<Peer>().ok_or_else(|| Status::unauthenticated("who calls is not known"))?;
        let address = peer.address.to_string();
        let state = self.state.borrow();
        let Some(identity) = &peer.identity else { return Ok((Caller::new(&state, None, "", address), false)) };
        let stranger = |who: String| Status::permission_denied(format!("{who} is not, or no longer, in this cluster"));
        if !is_member(&state, identity.role, &identity.id) && !self.may_be_news(&state, identity, path) {
            return Err(stranger(identity.to_string()));
        }
        if identity.role == Role::Manager
            && let Some(passed_on) = headers.get(CALLER)
        {
            let caller = passed_on.to_str().ok().and_then(|text| Caller::from_header(&state, text));
            let caller = caller.ok_or_else(|| Status::internal("a manager passed on a call of nobody"))?;
            // Who passed it on may not have heard yet that the caller was removed.
            if let Some(role) = caller.role
                && !caller.is_root()
                && !is_member(&state, role, &caller.id)
            {
                return Err(stranger(format!("{role} {}", caller.id)));
            }
            return Ok((caller, true));
        }
        Ok((Caller::new(&state, Some(identity.role), &identity.id, address), false))
    }

    /// When what a caller is told is over, whatever they want; `None` for what is short.
    fn over(&self, caller: &Caller, extensions: &http::Extensions, path: &str) -> Option<BoxFuture<'static, Status>> {
        if path.starts_with("/warren.v1.Raft/") || caller.is_root() && extensions.get::<Peer>().is_none() {
            return None;
        }
        // Who removes themselves, or the manager that they ask, is to hear that it is done.
        if caller.role.is_some() && REMOVALS.contains(&path) {
            return None;
        }
        if caller.role.is_none() {
            let mut place = self.visitors.enter(caller.client());
            return Some(Box::pin(async move {
                tokio::select! {
                    () = tokio::time::sleep(VISIT) => {
                        Status::deadline_exceeded("this takes too long for somebody without a certificate")
                    }
                    () = place.given_up() => {
                        Status::resource_exhausted("too many call without a certificate: try again")
                    }
                }
            }));
        }
        // Who passed it on must be a member as well, for as long as it lasts.
        let connected = extensions.get::<Peer>().and_then(|peer| peer.identity.as_ref());
        let connected = connected.map(|identity| (identity.role, identity.id.clone()));
        let own = caller.role.filter(|_| !caller.is_root()).map(|role| (role, caller.id.clone()));
        Some(self.turned_out(connected.into_iter().chain(own).collect()))
    }

    /// Returns when one of those who have called is no member any more. There are thousands of sessions: none has a timer of its own,
    /// or looks at every change of the state.
    fn turned_out(&self, callers: Vec<(Role, String)>) -> BoxFuture<'static, Status> {
        let (state, mut members) = (self.state.clone(), self.members.clone());
        Box::pin(async move {
            loop {
                members.mark_unchanged();
                let is_in = |(role, id): &(Role, String)| is_member(&state.borrow(), *role, id);
                if !callers.iter().all(is_in) {
                    return Status::permission_denied("you were removed from this cluster");
                }
                if members.changed().await.is_err() {
                    // This manager ends, and everything with it.
                    return future::pending().await;
                }
            }
        })
    }

    /// The way to the leader; `None` when that is this manager.
    async fn leader(&self) -> Result<Option<Channel>, Status> {
        let deadline = tokio::time::Instant::now() + LEADER_PATIENCE;
        loop {
            let status = self.raft.status();
            if status.is_leader {
                return Ok(None);
            }
            let leader =
                status.members.iter().find(|member| Some(member.id) == status.leader && member.id != status.id);
            if let Some(leader) = leader {
                let channel = self.peers.channel(&leader.address);
                return channel.map(Some).map_err(|error| Status::internal(error.to_string()));
            }
            if tokio::time::Instant::now() >= deadline {
                return Err(Status::unavailable("no manager leads: no majority of them can be reached"));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// Changes a moment after the state's members have, until the state is gone or nobody follows.
fn follow_members(mut state: watch::Receiver<State>) -> watch::Receiver<()> {
    let (sender, receiver) = watch::channel(());
    let mut known = state.borrow_and_update().clone();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                changed = state.changed() => if changed.is_err() { return },
                () = sender.closed() => return,
            }
            tokio::time::sleep(MEMBERS_LOOK).await;
            let now = state.borrow_and_update().clone();
            if !now.has_members_of(&known) {
                sender.send_replace(());
            }
            known = now;
        }
    });
    receiver
}

/// What somebody is told, until it is over for them. It is seen to apart from who reads it: one who does not is turned out all the same,
/// and what they were doing ends.
fn until_over(mut over: BoxFuture<'static, Status>, response: Response<Body>) -> Response<Body> {
    // An error is in the headers, and they are all: clients other than tonic's insist on that.
    if response.body().is_end_stream() {
        return response;
    }
    response.map(|body| {
        let (sender, receiver) = mpsc::channel(1);
        tokio::spawn(async move {
            let mut frames = BodyStream::new(body);
            let why = loop {
                let frame = tokio::select! {
                    frame = frames.next() => frame,
                    why = &mut over => break why,
                    () = sender.closed() => return,
                };
                let Some(frame) = frame else { return };
                tokio::select! {
                    sent = sender.send(frame) => if sent.is_err() { return },
                    why = &mut over => break why,
                }
            };
            drop(frames);
            let mut trailers = HeaderMap::new();
            if why.add_header(&mut trailers).is_ok() {
                let _ = sender.send(Ok(Frame::trailers(trailers))).await;
            }
        });
        Body::new(StreamBody::new(ReceiverStream::new(receiver)))
    })
}

impl<S> Layer<S> for Front {
    type Service = Fronted<S>;

    fn layer(&self, inner: S) -> Fronted<S> {
        Fronted { inner, front: self.clone() }
    }
}

/// An API with somebody before it.
#[derive(Clone, Debug)]
pub(crate) struct Fronted<S> {
    inner: S,
    front: Front,
}

impl<S> Service<Request<Body>> for Fronted<S>
where
    S: Service<Request<Body>, Response = Response<Body>> + Clone + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        // The one that is ready is this one; its clone need not be.
        let clone = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, clone);
        let front = self.front.clone();
        Box::pin(async move {
            front.await_news(request.extensions()).await;
            let (caller, passed_on) = match front.caller(request.uri().path(), request.extensions(), request.headers())
            {
                Ok(found) => found,
                Err(status) => return Ok(status.into_http()),
            };
            let path = request.uri().path();
            if !may(&caller, path) {
                let status = match caller.role {
                    None => Status::unauthenticated("this needs a certificate of the cluster"),
                    Some(role) => Status::permission_denied(format!("the role {role} may not call this")),
                };
                return Ok(status.into_http());
            }
            let (over, is_local) = (front.over(&caller, request.extensions(), path), is_local(path));
            let answer = async {
                let leader = if is_local { Ok(None) } else { front.leader().await };
                Ok(match leader {
                    Ok(None) => {
                        request.extensions_mut().insert(caller.clone());
                        caller.during(inner.call(request)).await?
                    }
                    // Two that each take the other for the leader would pass it on for ever.
                    Ok(Some(_)) if passed_on => Status::unavailable("the leader has changed").into_http(),
                    Ok(Some(leader)) => {
                        pass_on(leader, request, &caller).await.unwrap_or_else(|status| status.into_http())
                    }
                    Err(status) => status.into_http(),
                })
            };
            let Some(mut over) = over else { return answer.await };
            tokio::select! {
                answered = answer => answered.map(|response| until_over(over, response)),
                why = &mut over => Ok(why.into_http()),
            }
        })
    }
}

async fn pass_on(mut leader: Channel, mut request: Request<Body>, caller: &Caller) -> Result<Response<Body>, Status> {
    let header = HeaderValue::try_from(caller.to_header()).map_err(|_| Status::internal("who calls cannot be said"))?;
    request.headers_mut().insert(CALLER, header);
    request.extensions_mut().clear();
    let unavailable = |_| Status::unavailable("the leader does not answer");
    leader.ready().await.map_err(unavailable)?.call(request).await.map_err(unavailable)
}

#[cfg(test)]
mod tests {
    use std::{path::Path, sync::Arc, time::SystemTime};

    use futures::stream;
    use tokio::{sync::oneshot, time::timeout};
    use tonic::codegen::Bytes;
    use warren_pki::{Authority, Credentials, Request as CertificateRequest};
    use warren_raft::{Disconnected, Files, Options, Profile, Unobserved};

    use super::*;
    use crate::{
        clock::Timestamp,
        state::{
            Change, Machine, Operator,
            tests::{apply, founded},
        },
    };

    fn with_operator() -> State {
        let mut state = founded();
        let operator = Operator { id: "o".into(), name: "ada".to_owned(), created_at: Timestamp(1), invitation: None };
        apply(&mut state, [Change::CreateOperator(operator)]);
        state
    }

    #[test]
    fn methods_are_for_whom_their_options_say() {
        let state = with_operator();
        let caller = |role, id| Caller::new(&state, role, id, String::new());
        let callers = [
            caller(None, ""),
            caller(Some(Role::Manager), "1"),
            caller(Some(Role::Worker), "n"),
            caller(Some(Role::Admin), "o"),
            caller(Some(Role::Admin), ROOT),
        ];
        for (path, allowed, local) in [
            ("/warren.v1.Cluster/JoinCluster", [true, true, true, true, true], false),
            ("/warren.v1.Cluster/GetClusterInfo", [false, true, true, true, true], true),
            ("/warren.v1.Cluster/EnterManager", [false, true, false, false, false], false),
            ("/warren.v1.Raft/Exchange", [false, true, false, false, false], true),
            ("/warren.v1.Nodes/RegisterNode", [false, false, true, false, true], false),
            ("/warren.v1.Dispatcher/Session", [false, false, true, false, true], false),
            ("/warren.v1.Services/CreateService", [false, false, false, true, true], false),
            ("/warren.v1.Lock/Unlock", [false, false, false, true, true], true),
            ("/warren.v1.Services/NoSuchMethod", [false, false, false, true, true], false),
            ("/grpc.health.v1.Health/Check", [true, true, true, true, true], true),
            ("/grpc.health.v1.Health/Watch", [false, true, true, true, true], true),
        ] {
            assert_eq!(callers.each_ref().map(|caller| may(caller, path)), allowed, "{path}");
            assert_eq!(is_local(path), local, "{path}");
        }
        // Those without a certificate get to one of them.
        let of_anyone = Method::ALL.iter().filter(|method| method.access == Access::Anyone);
        assert_eq!(of_anyone.map(|method| method.path).collect::<Vec<_>>(), ["/warren.v1.Cluster/JoinCluster"]);
    }

    #[tokio::test]
    async fn who_does_not_read_is_turned_out_all_the_same() {
        let (held, dropped) = oneshot::channel::<()>();
        let endless = stream::repeat_with(move || {
            let _ = &held;
            Ok::<_, Status>(Frame::data(Bytes::from_static(b"more")))
        });
        let (end, over) = oneshot::channel::<()>();
        let over = async {
            let _ = over.await;
            Status::permission_denied("out")
        };
        let body = Body::new(StreamBody::new(endless));
        let response = until_over(Box::pin(over), Response::new(body));
        tokio::time::sleep(Duration::from_millis(10)).await;
        end.send(()).expect("it is waited for");
        let gone = tokio::time::timeout(Duration::from_secs(1), dropped).await.expect("what was being read is gone");
        assert!(gone.is_err());
        let told: Vec<_> = BodyStream::new(response.into_body()).collect().await;
        let last = told.last().and_then(|last| last.as_ref().ok()).and_then(Frame::trailers_ref).expect("trailers");
        assert_eq!(last.get("grpc-status"), Some(&HeaderValue::from_static("7")));
    }

    #[tokio::test]
    async fn an_error_is_nothing_but_headers() {
        let never = Box::pin(future::pending());
        let answer = until_over(never, Status::not_found("there is no such thing").into_http());
        assert!(answer.body().is_end_stream());
        assert_eq!(answer.headers().get("grpc-status"), Some(&HeaderValue::from_static("5")));
    }

    #[test]
    fn a_caller_survives_being_passed_on() {
        let state = with_operator();
        for role in [None, Some(Role::Manager), Some(Role::Worker), Some(Role::Admin)] {
            let caller = Caller::new(&state, role, "o", "[::1]:1".to_owned());
            assert_eq!(Caller::from_header(&state, &caller.to_header()), Some(caller.clone()));
            assert_eq!(caller.actor().id, if role == Some(Role::Admin) { "ada" } else { "o" });
        }
        assert_eq!(Caller::from_header(&state, "king|x|y"), None);
        assert_eq!(Caller::from_header(&state, ""), None);
    }

    /// A manager's own, of an authority that nobody else knows.
    fn credentials() -> Credentials {
        let authority = Authority::generate("cluster", SystemTime::now()).expect("an authority");
        let request = CertificateRequest::new().expect("a request");
        let identity = Identity { cluster: "cluster".to_owned(), role: Role::Manager, id: "1".to_owned() };
        let day = Duration::from_secs(24 * 3600);
        let certificate = authority.sign(request.pem(), &identity, SystemTime::now(), day).expect("signed");
        Credentials::new(&request.key_pem(), &certificate, authority.certificate_pem()).expect("credentials")
    }

    /// A manager that follows nobody, in this state.
    async fn front(directory: &Path, state: State) -> (Front, Node, watch::Sender<State>) {
        let options = Options {
            id: 1,
            address: "elsewhere:1".to_owned(),
            profile: Profile::Lan,
            snapshot_after: 1000,
            snapshot_after_bytes: 1 << 20,
        };
        let files = Arc::new(Files::new(directory));
        let (machine, _) = Machine::new();
        let follower =
            Node::join(&options, files, Box::new(machine), Arc::new(Disconnected), Arc::new(Unobserved)).await;
        let follower = follower.expect("starts");
        let (news, state) = watch::channel(state);
        (Front::new(follower.clone(), state, Peers::new(credentials())), follower, news)
    }

    #[tokio::test]
    async fn who_is_removed_is_turned_out() {
        let directory = tempfile::tempdir().expect("a directory");
        let mut state = with_operator();
        let (front, follower, news) = front(directory.path(), state.clone()).await;
        let mut out = front.turned_out(vec![(Role::Admin, "o".to_owned())]);
        assert!(timeout(Duration::from_millis(50), &mut out).await.is_err(), "they are a member");
        let other = Operator { id: "p".into(), name: "bob".to_owned(), created_at: Timestamp(1), invitation: None };
        apply(&mut state, [Change::CreateOperator(other)]);
        news.send_replace(state.clone());
        assert!(timeout(MEMBERS_LOOK * 2, &mut out).await.is_err(), "it is about somebody else");
        apply(&mut state, [Change::DeleteOperator { id: "o".into() }]);
        news.send_replace(state);
        let why = timeout(MEMBERS_LOOK * 2, &mut out).await.expect("turned out");
        assert_eq!(why.message(), "you were removed from this cluster");
        follower.shutdown().await;
    }

    #[tokio::test]
    async fn who_was_let_in_a_moment_ago_is_no_stranger() {
        let directory = tempfile::tempdir().expect("a directory");
        let (front, follower, news) = front(directory.path(), founded()).await;
        let mut api =
            front.layer(tower::service_fn(async |_: Request<Body>| Ok::<_, Status>(Response::new(Body::empty()))));
        let mut call = |id: &str| {
            // Answered by any manager.
            let mut request = Request::new(Body::empty());
            *request.uri_mut() = "/warren.v1.Cluster/GetClusterInfo".parse().expect("a path");
            let identity = Identity { cluster: "cluster".to_owned(), role: Role::Admin, id: id.to_owned() };
            let peer = Peer { address: ([127, 0, 0, 1], 1).into(), identity: Some(identity) };
            request.extensions_mut().insert(peer);
            api.call(request)
        };
        let refused = |response: &Response<Body>| response.headers().get("grpc-status").is_some();
        let (early, ()) = tokio::join!(call("o"), async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            news.send_replace(with_operator());
        });
        assert!(!refused(&early.expect("answered")));
        let stranger = call("p").await.expect("answered");
        assert_eq!(stranger.headers().get("grpc-status"), Some(&HeaderValue::from_static("7")));
        follower.shutdown().await;
    }
}
