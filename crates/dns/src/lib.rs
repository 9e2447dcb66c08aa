//! Names of services, for the containers of one node.
//!
//! [`Zone`] answers for the cluster's own names from immutable tables and does no I/O; [`serve`] puts it behind UDP and TCP,
//! forwards everything else to the node's resolvers, and keeps what they answered. The cluster's own names, and the reverse
//! names of its own addresses, are never asked of anybody else.
//!
//! | name, alone or below the domain | answer |
//! |---|---|
//! | `web` | addresses of its healthy containers, in changing order; in mode VIP its virtual addresses |
//! | `web-2` | addresses of the container in slot 2 |
//! | `vip.web` | its virtual addresses |
//! | `_http._tcp.web` | SRV: the port named `http` of each healthy container |

mod exchange;
mod fast;
mod forward;
mod server;
mod zone;

pub use forward::{Forwarder, Upstreams};
pub use server::{BindError, Limits, Observer, Sockets, Source, serve};
pub use zone::{Answer, Zone};
