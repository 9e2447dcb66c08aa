//! Names of the groups that DNS queries are accounted to.

use std::collections::HashMap;

use warren_agent_ebpf::abi::{GROUP_NAME_LEN, GroupName, group};

use super::{Error, Maps};

/// Hands out group numbers for names and finds the names again. They are kept in a pinned map beside the counts.
#[derive(Debug, Default)]
pub struct Groups {
    by_name: HashMap<String, u32>,
    names: HashMap<u32, String>,
}

impl Groups {
    /// Reads the groups that were handed out before.
    #[must_use]
    pub fn load(maps: &Maps) -> Self {
        let mut groups = Self::default();
        for (number, name) in maps.written().group_names.iter().flatten() {
            let text = String::from_utf8_lossy(&name).trim_end_matches('\0').to_owned();
            groups.by_name.insert(text.clone(), number);
            groups.names.insert(number, text);
        }
        groups
    }

    /// The number of the group with this name, which is cut to what fits.
    ///
    /// # Errors
    ///
    /// When there are too many groups.
    pub fn number(&mut self, maps: &Maps, name: &str) -> Result<u32, Error> {
        let name = fit(name);
        if let Some(number) = self.by_name.get(&name) {
            return Ok(*number);
        }
        let number = self.names.keys().max().map_or(group::FIRST_ASSIGNED, |last| last + 1);
        let mut bytes: GroupName = [0; GROUP_NAME_LEN];
        bytes[..name.len()].copy_from_slice(name.as_bytes());
        maps.written()
            .group_names
            .insert(number, bytes, 0)
            .map_err(|source| Error::Map { map: "GROUP_NAMES", source })?;
        self.by_name.insert(name.clone(), number);
        self.names.insert(number, name);
        Ok(number)
    }

    /// The name of a group, as the `service` label shows it.
    #[must_use]
    pub fn name(&self, number: u32) -> &str {
        match number {
            group::HOST => "host",
            group::UNASSIGNED => "unknown",
            group::OVERFLOW => "overflow",
            _ => self.names.get(&number).map_or("unknown", String::as_str),
        }
    }
}

/// As much of a name as a map value holds, without what would break a label.
fn fit(name: &str) -> String {
    let mut fitted = String::new();
    for c in name.chars().filter(|c| !c.is_control()) {
        if fitted.len() + c.len_utf8() > GROUP_NAME_LEN {
            break;
        }
        fitted.push(c);
    }
    fitted
}
