use std::{collections::BTreeMap, sync::Arc, time::Duration};

use prost::Message as _;
use tonic::{Request, Response, Status};
use warren_proto::v1::{self, nodes_server};

use super::{Context, Error, lookup, pages::page};
use crate::{
    agents::pace::{Pace, Paces},
    caller::Caller,
    control::liveness::Health,
    ids::NodeId,
    messages::{
        convert,
        validate::{self, Invalid},
    },
    state::{Availability, Change, Constraint, Node, State, Trait, Transaction},
};

#[derive(Clone, Debug)]
pub(super) struct Nodes {
    context: Context,
    /// How often each node says something else of itself.
    descriptions: Paces<NodeId>,
}

const MAX_ID: usize = 64;
/// Everything that a node says of itself, encoded.
const MAX_DESCRIPTION: usize = 64 << 10;

/// Whether that could be a node's id.
pub(super) fn is_id(id: &NodeId) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    (1..=MAX_ID).contains(&id.as_str().len()) && id.as_str().bytes().all(plain)
}

impl Nodes {
    pub(super) fn new(context: Context) -> Self {
        Self { context, descriptions: Paces::new(DESCRIPTIONS) }
    }

    fn shown(&self, node: &Node, state: &State) -> v1::Node {
        let conditions = self.context.liveness.conditions(&node.id);
        convert::node(node, state, self.context.liveness.standing(&node.id), &conditions)
    }

    async fn register(&self, request: v1::RegisterNodeRequest, caller: &Caller) -> Result<v1::Node, Error> {
        let id = NodeId::from(request.node_id);
        if !is_id(&id) {
            let why = format!("is not 1 to {MAX_ID} of a-z and 0-9");
            return Err(Invalid::new("node_id", why).into());
        }
        let description = request.description.unwrap_or_default();
        if description.encoded_len() > MAX_DESCRIPTION {
            return Err(Invalid::new("description", format!("is larger than {MAX_DESCRIPTION} bytes")).into());
        }
        let description = convert::description(description);
        let state = self.context.store.read().await?;
        validate::description(&description, state.cluster().map(|cluster| &cluster.network))?;
        let is_other = |node: &&Arc<Node>| node.id != id && node.description.hostname == description.hostname;
        if let Some(other) =
            state.nodes().find(|node| is_other(node) && self.context.liveness.health(&node.id).is_reachable())
        {
            // Metrics, constraints and people tell nodes apart by it.
            let (hostname, other) = (&description.hostname, &other.id);
            return Err(Error::Precondition(format!(
                "node {other} is {hostname} too, and is running: give one of them another name (--hostname)"
            )));
        }
        let key = &description.wireguard_public_key;
        let has_its_key = |node: &&Arc<Node>| node.id != id && node.description.wireguard_public_key == *key;
        if !key.is_empty() && state.nodes().any(|node| has_its_key(&node)) {
            return Err(
                Invalid::new("description.wireguard_public_key", "is another node's: remove that one first").into()
            );
        }
        let known = state.node(&id);
        let others = || state.nodes().filter(|node| node.id != id);
        let before = known.map(|known| known.description.hostname.as_str());
        let is_renamed = before.is_some_and(|before| before != description.hostname);
        if (is_renamed || others().any(|other| other.description.hostname == description.hostname))
            && let Some(service) = names_either(&state, &description.hostname, before)
        {
            // Else a node could call itself what such a service waits for, and be given its secrets.
            return Err(Error::Precondition(format!(
                "the constraints of service {service} name this hostname: remove the node that has it first (`warren node rm`), or \
                 join as a new one"
            )));
        }
        if let Some(address) = description.address
            && !caller.may_be_at(address)
            && let Some(other) = others().find(|other| other.description.address == Some(address))
        {
            let why =
                format!("{address} is node {}'s, and this node does not call from there", other.description.hostname);
            return Err(Invalid::new("description.address", why).into());
        }
        // A node that comes back as it was costs no log entry.
        if known.is_none_or(|known| known.description != description) {
            if !self.descriptions.allows(&id) {
                return Err(Error::TooOften(format!(
                    "node {id} says something else of itself too often: it is listened to again in {} s",
                    DESCRIPTIONS.pause.as_secs()
                )));
            }
            let created_at = known.map_or_else(|| self.context.environment.now(), |known| known.created_at);
            let (availability, labels) = Default::default();
            let node =
                Node { id: id.clone(), version: 0, created_at, description, subnet_index: 0, availability, labels };
            let changes = vec![Change::PutNode(Box::new(node))];
            self.context.store.transact(&Transaction { changes, ..Transaction::default() }).await?;
        }
        let state = self.context.store.view();
        let node = state.node(&id).ok_or(Error::NotFound { kind: "node", name: id.to_string() })?;
        Ok(self.shown(node, &state))
    }

    async fn update(&self, request: v1::UpdateNodeRequest) -> Result<v1::Node, Error> {
        let state = self.context.store.read().await?;
        let node = lookup::node(&state, &request.node)?;
        let availability = match v1::Availability::try_from(request.availability) {
            Ok(v1::Availability::Unspecified) => None,
            Ok(v1::Availability::Active) => Some(Availability::Active),
            Ok(v1::Availability::Cordoned) => Some(Availability::Cordoned),
            Ok(v1::Availability::Drained) => Some(Availability::Drained),
            Err(_) => return Err(Invalid::new("availability", format!("{} is not known", request.availability)).into()),
        };
        let removed = request.remove_labels.into_iter().map(|name| (name, None));
        let mut labels: BTreeMap<_, _> = removed.collect();
        labels.extend(request.set_labels.into_iter().map(|(name, value)| (name, Some(value))));
        validate::node_labels(&labels)?;
        let is_set = |(name, value): (&String, &Option<String>)| node.labels.get(name) == value.as_ref();
        // What is so already costs no log entry.
        if availability.is_some_and(|wanted| wanted != node.availability) || !labels.iter().all(is_set) {
            let changes = vec![Change::SetNode { id: node.id.clone(), availability, labels }];
            self.context.store.transact(&Transaction { changes, ..Transaction::default() }).await?;
        }
        let state = self.context.store.view();
        let node = state.node(&node.id).ok_or(Error::NotFound { kind: "node", name: request.node })?;
        Ok(self.shown(node, &state))
    }

    async fn remove(&self, name: &str, force: bool) -> Result<(), Error> {
        let state = self.context.store.read().await?;
        let node = match lookup::node(&state, name) {
            // One that was let in and whose agent never came.
            Err(Error::NotFound { .. }) if let Some(id) = named_awaited(&state, name) => {
                let changes = vec![Change::DeleteNode { id: id.clone() }];
                self.context.store.transact(&Transaction { changes, ..Transaction::default() }).await?;
                return Ok(());
            }
            found => found?,
        };
        if !force && self.context.liveness.health(&node.id) != Health::Down {
            let hostname = &node.description.hostname;
            return Err(Error::Precondition(format!(
                "node {hostname} is not down: stop its agent, and wait until it has been silent for a while, or use --force"
            )));
        }
        let changes = vec![Change::DeleteNode { id: node.id.clone() }];
        self.context.store.transact(&Transaction { changes, ..Transaction::default() }).await?;
        Ok(())
    }
}

/// A service whose constraints name one of these hostnames.
fn names_either<'a>(state: &'a State, hostname: &str, before: Option<&str>) -> Option<&'a str> {
    let names = |constraint: &Constraint| {
        constraint.of == Trait::Hostname && (constraint.value == hostname || before == Some(constraint.value.as_str()))
    };
    let found = state.services().find(|service| service.spec.constraints.iter().any(names));
    found.map(|service| service.spec.name.as_str())
}

/// A node may say so often that it is another. Each time is a log entry.
const DESCRIPTIONS: Pace = Pace { burst: 20, pause: Duration::from_secs(5) };

/// A node that was let in and whose agent never came, as callers see it.
fn awaited(id: &NodeId) -> v1::Node {
    v1::Node {
        id: id.to_string(),
        status: v1::NodeStatus::Pending.into(),
        status_message: "it has joined, and its agent was never heard of: start it".to_owned(),
        ..Default::default()
    }
}

/// The one that is meant by an id or a unique prefix of it.
fn named_awaited<'a>(state: &'a State, name: &str) -> Option<&'a NodeId> {
    let mut named = state.awaited_nodes().filter(|id| !name.is_empty() && id.as_str().starts_with(name));
    named.next().filter(|_| named.next().is_none())
}

#[tonic::async_trait]
impl nodes_server::Nodes for Nodes {
    async fn register_node(
        &self,
        request: Request<v1::RegisterNodeRequest>,
    ) -> Result<Response<v1::RegisterNodeResponse>, Status> {
        let caller = Caller::of(&request)?.clone();
        caller.check_node(&NodeId::from(request.get_ref().node_id.as_str()))?;
        let node = self.register(request.into_inner(), &caller).await?;
        let state = self.context.store.view();
        let networks = state.cluster().map(|cluster| cluster.network.prefixes()).unwrap_or_default();
        let cluster_networks = networks.iter().map(ToString::to_string).collect();
        Ok(Response::new(v1::RegisterNodeResponse { node: Some(node), cluster_networks }))
    }

    async fn list_nodes(
        &self,
        request: Request<v1::ListNodesRequest>,
    ) -> Result<Response<v1::ListNodesResponse>, Status> {
        let request = request.into_inner();
        let state = self.context.store.read().await.map_err(super::status)?;
        let key = |node: &v1::Node| {
            format!("{}\0{}", node.description.as_ref().map_or("", |described| &described.hostname), node.id)
        };
        let mut nodes: Vec<_> = state.nodes().map(|node| self.shown(node, &state)).collect();
        nodes.extend(state.awaited_nodes().map(awaited));
        nodes.sort_by_cached_key(key);
        let (nodes, next_page_token) = page(nodes, key, (request.page_size, &request.page_token), Ok)?;
        Ok(Response::new(v1::ListNodesResponse { nodes, next_page_token }))
    }

    async fn get_node(&self, request: Request<v1::GetNodeRequest>) -> Result<Response<v1::GetNodeResponse>, Status> {
        let state = self.context.store.read().await.map_err(super::status)?;
        let name = request.into_inner().node;
        let node = match lookup::node(&state, &name) {
            Ok(node) => self.shown(&node, &state),
            Err(error) => awaited(named_awaited(&state, &name).ok_or(error)?),
        };
        Ok(Response::new(v1::GetNodeResponse { node: Some(node) }))
    }

    async fn update_node(
        &self,
        request: Request<v1::UpdateNodeRequest>,
    ) -> Result<Response<v1::UpdateNodeResponse>, Status> {
        let node = self.update(request.into_inner()).await?;
        Ok(Response::new(v1::UpdateNodeResponse { node: Some(node) }))
    }

    async fn remove_node(
        &self,
        request: Request<v1::RemoveNodeRequest>,
    ) -> Result<Response<v1::RemoveNodeResponse>, Status> {
        let request = request.into_inner();
        self.remove(&request.node, request.force).await?;
        Ok(Response::new(v1::RemoveNodeResponse {}))
    }
}
