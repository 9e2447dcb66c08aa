//! Names of the groups that DNS queries are accounted to.

use std::collections::{BTreeSet, HashMap};

use warren_agent_ebpf::abi::{GROUP_NAME_LEN, GroupName, group};

use super::{Error, Maps};

/// Hands out group numbers for names and finds the names again. They are kept in a pinned map beside the counts.
#[derive(Debug, Default)]
pub struct Groups {
    by_name: HashMap<String, u32>,
    names: HashMap<u32, String>,
    /// The highest number that was handed out. Numbers are not used again: a query on its way may still have one.
    last: u32,
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
            groups.last = groups.last.max(number);
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
        let number = (self.last + 1).max(group::FIRST_ASSIGNED);
        let mut bytes: GroupName = [0; GROUP_NAME_LEN];
        bytes[..name.len()].copy_from_slice(name.as_bytes());
        maps.written()
            .group_names
            .insert(number, bytes, 0)
            .map_err(|source| Error::Map { map: "GROUP_NAMES", source })?;
        self.last = number;
        self.by_name.insert(name.clone(), number);
        self.names.insert(number, name);
        Ok(number)
    }

    /// Makes room, once there is little: forgets the groups that no container is accounted to any more, with their series. Returns how
    /// many.
    ///
    /// # Errors
    ///
    /// When a map cannot be written.
    pub fn forget_unused(&mut self, maps: &Maps) -> Result<usize, Error> {
        if !maps.is_filling_up() {
            return Ok(0);
        }
        let used = maps.used_groups();
        let unused: BTreeSet<u32> = self.names.keys().copied().filter(|number| !used.contains(number)).collect();
        maps.forget_groups(&unused)?;
        self.names.retain(|number, _| !unused.contains(number));
        self.by_name.retain(|_, number| !unused.contains(number));
        Ok(unused.len())
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
