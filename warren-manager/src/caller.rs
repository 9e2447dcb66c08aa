//! Who calls: how answers know, and changes are noted as theirs.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use http::Request;
use tonic::Status;
use warren_connections::client;
use warren_pki::Role;

use crate::{
    ids::{NodeId, OperatorId},
    state::{Actor, State},
};

/// Who calls at a manager's socket. No operator has this id.
pub(crate) const ROOT: &str = "root";

/// Who calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Caller {
    /// What they are; nothing, without a certificate.
    pub role: Option<Role>,
    /// Who; [`ROOT`] at the socket.
    pub id: String,
    /// The same for people: an operator's name.
    pub name: String,
    /// From where.
    pub address: String,
}

tokio::task_local! {
    static CURRENT: Caller;
}

/// Takes a call that comes from within the process, and by no front, for root's.
#[must_use]
pub fn as_root<B>(mut request: Request<B>) -> Request<B> {
    let root = || ROOT.to_owned();
    request.extensions_mut().insert(Caller {
        role: Some(Role::Admin),
        id: root(),
        name: root(),
        address: String::new(),
    });
    request
}

impl Caller {
    /// Whose call is being answered, where one is.
    pub(crate) fn current() -> Option<Self> {
        CURRENT.try_with(Clone::clone).ok()
    }

    /// Has this be their call that is being answered.
    pub(crate) async fn during<F: Future>(self, answer: F) -> F::Output {
        CURRENT.scope(self, answer).await
    }

    /// Whose call this is. One of nobody's is refused: what answers it has no front before it.
    pub(crate) fn of<T>(request: &tonic::Request<T>) -> Result<&Self, Status> {
        let caller = request.extensions().get::<Self>();
        caller.ok_or_else(|| Status::permission_denied("nobody says whose call this is"))
    }

    /// As the history of changes names them.
    pub(crate) fn actor(&self) -> Actor {
        let role = self.role.map_or("", Role::name).to_owned();
        Actor { id: self.name.clone(), role, address: self.address.clone() }
    }

    pub(crate) fn new(state: &State, role: Option<Role>, id: &str, address: String) -> Self {
        let operator = (role == Some(Role::Admin)).then(|| state.operator(&OperatorId::from(id))).flatten();
        let name = operator.map_or(id, |operator| &operator.name).to_owned();
        Self { role, id: id.to_owned(), name, address }
    }

    /// Whether they call at a manager's socket.
    pub(crate) fn is_root(&self) -> bool {
        (self.role, self.id.as_str()) == (Some(Role::Admin), ROOT)
    }

    /// From where they call; `None` at a socket.
    fn ip(&self) -> Option<IpAddr> {
        self.address.parse().ok().map(|address: SocketAddr| address.ip().to_canonical())
    }

    /// Whom limits take them for.
    pub(crate) fn client(&self) -> IpAddr {
        self.ip().map_or(Ipv4Addr::UNSPECIFIED.into(), client)
    }

    /// Whether their machine may have this address: it is where they call from, or they are on a manager's machine.
    pub(crate) fn may_be_at(&self, address: IpAddr) -> bool {
        self.ip().is_none_or(|ip| ip == address || ip.is_loopback())
    }

    pub(crate) fn to_header(&self) -> String {
        format!("{}|{}|{}", self.role.map_or("", Role::name), self.id, self.address)
    }

    pub(crate) fn from_header(state: &State, text: &str) -> Option<Self> {
        let mut parts = text.splitn(3, '|');
        let (role, id, address) = (parts.next()?, parts.next()?, parts.next()?);
        let role = if role.is_empty() { None } else { Some(role.parse().ok()?) };
        Some(Self::new(state, role, id, address.to_owned()))
    }

    /// Whether they may speak for a node: it is theirs, or they are root, as whom the agent of a manager's machine calls.
    ///
    /// # Errors
    ///
    /// When they may not.
    pub(crate) fn check_node(&self, node: &NodeId) -> Result<(), Status> {
        match self.role {
            _ if self.is_root() => Ok(()),
            Some(Role::Worker) if self.id == node.as_str() => Ok(()),
            _ => Err(Status::permission_denied(format!("{} does not speak for node {node}", self.name))),
        }
    }
}
