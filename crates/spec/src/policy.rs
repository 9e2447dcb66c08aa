use clap::Args;

use crate::{absolute, capability, inside};

/// What a container may do as root unless its service says otherwise: Docker's and containerd's default set.
pub const DEFAULT_CAPABILITIES: [&str; 14] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "NET_RAW",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];

/// What containers may have of their node, by which they could become more than containers. Managers refuse services that want more
/// of it, agents their containers: both must allow it.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
pub struct Policy {
    /// Allow privileged containers. They have root's rights on the node, so this implies all other --allow options.
    #[arg(long, env = "WARREN_ALLOW_PRIVILEGED")]
    pub allow_privileged: bool,
    /// Allow containers to use the host network.
    #[arg(long, env = "WARREN_ALLOW_HOST_NETWORK")]
    pub allow_host_network: bool,
    /// Allow bind mounts and volumes of type bind of this host directory and anything below it; may be repeated or
    /// comma-separated.
    #[arg(long, env = "WARREN_ALLOW_HOST_PATHS", value_name = "DIRECTORY", value_delimiter = ',', value_parser = directory)]
    pub allow_host_path: Vec<String>,
    /// Allow containers to add this capability beyond the default set, or ALL; may be repeated or comma-separated.
    #[arg(long, env = "WARREN_ALLOW_CAPABILITIES", value_name = "NAME", value_delimiter = ',', value_parser = known)]
    pub allow_capability: Vec<&'static str>,
    /// Allow this host device, or all devices below this directory, like /dev/dri; may be repeated or comma-separated.
    #[arg(long, env = "WARREN_ALLOW_DEVICES", value_name = "PATH", value_delimiter = ',', value_parser = directory)]
    pub allow_device: Vec<String>,
}

fn directory(text: &str) -> Result<String, String> {
    let trimmed = if text.len() > 1 { text.trim_end_matches('/') } else { text };
    if absolute(trimmed) { Ok(trimmed.to_owned()) } else { Err("not an absolute path without . and ..".to_owned()) }
}

fn known(text: &str) -> Result<&'static str, String> {
    capability(text).ok_or_else(|| "no capability".to_owned())
}

/// What a policy does not allow.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("is not allowed: {allowing} of managers and agents would allow it")]
pub struct NotAllowed {
    /// The option that would.
    allowing: String,
}

impl Policy {
    /// All of it.
    #[must_use]
    pub fn everything() -> Self {
        Self { allow_privileged: true, ..Self::default() }
    }

    fn unless(&self, allowed: bool, allowing: impl FnOnce() -> String) -> Result<(), NotAllowed> {
        if allowed || self.allow_privileged { Ok(()) } else { Err(NotAllowed { allowing: allowing() }) }
    }

    /// Whether containers may be privileged.
    ///
    /// # Errors
    ///
    /// When they may not.
    pub fn privileged(&self) -> Result<(), NotAllowed> {
        self.unless(false, || "--allow-privileged".to_owned())
    }

    /// Whether containers may have their node's network.
    ///
    /// # Errors
    ///
    /// When they may not.
    pub fn host_network(&self) -> Result<(), NotAllowed> {
        self.unless(self.allow_host_network, || "--allow-host-network".to_owned())
    }

    /// Whether containers may have a file or directory of their node; an absolute path.
    ///
    /// # Errors
    ///
    /// When they may not.
    pub fn host_path(&self, path: &str) -> Result<(), NotAllowed> {
        let allowed = self.allow_host_path.iter().any(|allowed| inside(path, allowed));
        self.unless(allowed, || format!("--allow-host-path {path}"))
    }

    /// Whether containers may add a capability, by any of its names.
    ///
    /// # Errors
    ///
    /// When they may not.
    pub fn capability(&self, name: &str) -> Result<(), NotAllowed> {
        let Some(name) = capability(name) else { return Ok(()) };
        let allowed = DEFAULT_CAPABILITIES.contains(&name)
            || self.allow_capability.contains(&"ALL")
            || self.allow_capability.contains(&name);
        self.unless(allowed, || format!("--allow-capability {name}"))
    }

    /// Whether containers may have a device of their node; an absolute path.
    ///
    /// # Errors
    ///
    /// When they may not.
    pub fn device(&self, path: &str) -> Result<(), NotAllowed> {
        let allowed = self.allow_device.iter().any(|allowed| inside(path, allowed));
        self.unless(allowed, || format!("--allow-device {path}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_allowed_that_is_not_said() {
        let closed = Policy::default();
        assert_eq!(
            closed.host_network().map_err(|error| error.to_string()),
            Err("is not allowed: --allow-host-network of managers and agents would allow it".to_owned())
        );
        assert!(
            closed.privileged().is_err() && closed.host_path("/srv").is_err() && closed.device("/dev/fuse").is_err()
        );
        assert!(closed.capability("CAP_CHOWN").is_ok() && closed.capability("net_admin").is_err());
        assert!(closed.capability("ALL").is_err());
        let open = Policy {
            allow_host_path: vec!["/srv/data".to_owned()],
            allow_capability: vec!["NET_ADMIN"],
            allow_device: vec!["/dev/dri".to_owned()],
            ..Policy::default()
        };
        assert!(open.host_path("/srv/data").is_ok() && open.host_path("/srv/data/x").is_ok());
        for closed in ["/srv", "/", "/srv/database", "/srv/data2"] {
            assert!(open.host_path(closed).is_err(), "{closed}");
        }
        assert!(open.capability("CAP_NET_ADMIN").is_ok() && open.capability("ALL").is_err());
        assert!(open.device("/dev/dri/card0").is_ok() && open.device("/dev/dri2").is_err());
        let all = Policy::everything();
        assert!(all.privileged().is_ok() && all.host_network().is_ok() && all.host_path("/").is_ok());
        assert!(all.capability("ALL").is_ok() && all.device("/dev/sda").is_ok());
        let every = Policy { allow_capability: vec!["ALL"], ..Policy::default() };
        assert!(every.capability("SYS_ADMIN").is_ok() && every.capability("all").is_ok());
    }

    #[test]
    fn options_are_read_as_they_are_written() {
        assert_eq!(directory("/srv/"), Ok("/srv".to_owned()));
        assert_eq!(directory("/"), Ok("/".to_owned()));
        for wrong in ["srv", "/srv/../etc", ""] {
            assert!(directory(wrong).is_err(), "{wrong}");
        }
        assert_eq!(known("cap_net_admin"), Ok("NET_ADMIN"));
        assert!(known("EVERYTHING").is_err());
    }
}
