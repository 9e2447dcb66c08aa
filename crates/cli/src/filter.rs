//! `--filter`: which of the listed are shown.

use std::str::FromStr;

use clap::Args;
use prost_reflect::{
    DescriptorPool, DynamicMessage, EnumDescriptor, FieldDescriptor, Kind, MapKey, MessageDescriptor, ReflectMessage,
    Value, prost::Name,
};
use warren_proto::FILE_DESCRIPTOR_SET;

use crate::{
    error::Error,
    output::{Format, FormatArguments},
};

/// How to show a list, and what of it.
#[derive(Args, Clone, Debug)]
pub(crate) struct ListArguments {
    #[command(flatten)]
    format: FormatArguments,
    /// Only objects with this field value, FIELD=VALUE or FIELD!=VALUE; may be repeated, and all must match. Fields are
    /// those of --format json, like status=down or spec.labels.tier=front.
    #[arg(long = "filter", value_name = "FIELD=VALUE")]
    filters: Vec<Filter>,
}

impl ListArguments {
    pub(crate) fn format(&self) -> Format {
        self.format.format
    }

    /// Those that every filter lets through.
    ///
    /// # Errors
    ///
    /// [`Error::Usage`] for a field that such messages do not have, also of an empty list.
    pub(crate) fn apply<T: Name>(&self, mut listed: Vec<T>) -> Result<Vec<T>, Error> {
        if self.filters.is_empty() {
            return Ok(listed);
        }
        let pool = DescriptorPool::decode(FILE_DESCRIPTOR_SET).expect("what the build wrote");
        let descriptor = pool.get_message_by_name(&T::full_name()).expect("a message of the contract");
        for filter in &self.filters {
            filter.lets_through(&DynamicMessage::new(descriptor.clone()))?;
        }
        listed.retain(|message| {
            let mut dynamic = DynamicMessage::new(descriptor.clone());
            dynamic.transcode_from(message).expect("the same message");
            self.filters.iter().all(|filter| filter.lets_through(&dynamic).unwrap_or(false))
        });
        Ok(listed)
    }
}

/// Where messages have their names that have no field of that name.
fn name_of(descriptor: &MessageDescriptor) -> Option<&'static str> {
    match descriptor.name() {
        "Service" => Some("spec.name"),
        "Node" => Some("description.hostname"),
        _ => None,
    }
}

/// A condition on a field.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Filter {
    /// The field's name in JSON, with those of the messages that it is in before it: `spec.labels.tier`.
    field: String,
    value: String,
    negated: bool,
}

impl FromStr for Filter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (field, value) = text.split_once('=').ok_or_else(|| format!("{text:?} is not FIELD=VALUE"))?;
        let (field, negated) = field.strip_suffix('!').map_or((field, false), |field| (field, true));
        Ok(Self { field: field.to_owned(), value: value.to_owned(), negated })
    }
}

impl Filter {
    fn lets_through(&self, message: &DynamicMessage) -> Result<bool, Error> {
        let equal =
            self.finds(message, &self.field).map_err(|why| Error::Usage(format!("--filter {}: {why}", self.field)))?;
        Ok(equal != self.negated)
    }

    /// Whether a container has the wanted name, like web-1; or is of the service of this name.
    fn is_container(&self, message: &DynamicMessage) -> bool {
        let field = |name: &str| message.get_field_by_name(name).map(|value| value.into_owned());
        let service = field("service_name").and_then(|value| value.as_str().map(str::to_owned)).unwrap_or_default();
        let slot = field("slot").and_then(|value| value.as_u32()).unwrap_or(0);
        self.value == service || (slot > 0 && self.value == format!("{service}-{slot}"))
    }

    /// Whether what `path` names in a message is the wanted value; one of several is enough.
    fn finds(&self, message: &DynamicMessage, path: &str) -> Result<bool, String> {
        let (name, rest) = path.split_once('.').map_or((path, None), |(name, rest)| (name, Some(rest)));
        let descriptor = message.descriptor();
        let field = descriptor.fields().find(|field| field.json_name() == name);
        if let (None, "name", None, "Container") = (&field, name, rest, descriptor.name()) {
            return Ok(self.is_container(message));
        }
        if let (None, "name", None) = (&field, name, rest)
            && let Some(own) = name_of(&descriptor)
        {
            return self.finds(message, own);
        }
        let field = field.ok_or_else(|| format!("there is no field {name:?}; there are {}", fields(&descriptor)))?;
        match message.get_field(&field).as_ref() {
            // A key may have dots in it.
            Value::Map(map) => {
                let key = rest.ok_or_else(|| format!("{name} has several values; say which, as {name}.KEY"))?;
                let value = map.get(&MapKey::String(key.to_owned()));
                Ok(value.and_then(Value::as_str).unwrap_or_default() == self.value)
            }
            Value::List(values) => {
                // What an empty list could have is looked at all the same: a wrong name is wrong for all lists.
                let example = Value::default_value(&field.kind());
                self.matches(&example, &field, rest)?;
                values.iter().try_fold(false, |found, value| Ok(found || self.matches(value, &field, rest)?))
            }
            value => self.matches(value, &field, rest),
        }
    }

    fn matches(&self, value: &Value, field: &FieldDescriptor, rest: Option<&str>) -> Result<bool, String> {
        let name = field.json_name();
        match (value, field.kind(), rest) {
            (Value::Message(message), _, Some(rest)) => self.finds(message, rest),
            (Value::Message(message), ..) => {
                Err(format!("{name} is no value; it has the fields {}", fields(&message.descriptor())))
            }
            (_, _, Some(_)) => Err(format!("{name} has no fields")),
            (Value::EnumNumber(number), Kind::Enum(kind), None) => Ok(self.number_of(&kind)? == *number),
            (value, ..) => Ok(text(value) == self.value),
        }
    }

    /// Which number of an enumeration is wanted, by the whole name or by what is after the enumeration's: `down` is
    /// `NODE_STATUS_DOWN`.
    fn number_of(&self, kind: &EnumDescriptor) -> Result<i32, String> {
        let all = || kind.values().map(|value| (value.name().to_owned(), value.number()));
        // The first is what is not specified, after which all are named.
        let prefix = all().find_map(|(name, _)| Some(name.strip_suffix("UNSPECIFIED")?.to_owned())).unwrap_or_default();
        let short = |name: &str| name.strip_prefix(&prefix).unwrap_or(name).to_lowercase();
        let wanted = all().find(|(name, _)| *name == self.value || short(name) == self.value.to_lowercase());
        let names = || all().map(|(name, _)| short(&name)).collect::<Vec<_>>().join(", ");
        wanted.map(|(_, number)| number).ok_or_else(|| format!("{:?} is none of {}", self.value, names()))
    }
}

fn fields(message: &MessageDescriptor) -> String {
    message.fields().map(|field| field.json_name().to_owned()).collect::<Vec<_>>().join(", ")
}

/// A value as people write it.
fn text(value: &Value) -> String {
    match value {
        Value::Bool(value) => value.to_string(),
        Value::I32(value) => value.to_string(),
        Value::I64(value) => value.to_string(),
        Value::U32(value) => value.to_string(),
        Value::U64(value) => value.to_string(),
        Value::F32(value) => value.to_string(),
        Value::F64(value) => value.to_string(),
        Value::String(value) => value.clone(),
        Value::Bytes(value) => String::from_utf8_lossy(value).into_owned(),
        Value::EnumNumber(_) | Value::Message(_) | Value::List(_) | Value::Map(_) => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use warren_proto::v1;

    use super::*;

    fn names(filters: &[&str]) -> Result<Vec<String>, String> {
        let node = |name: &str, status: v1::NodeStatus, disk: &str, subnets: &[&str]| v1::Node {
            id: name.to_owned(),
            status: status.into(),
            containers: 3,
            labels: BTreeMap::from([("example.org/disk".to_owned(), disk.to_owned())]),
            subnets: subnets.iter().map(|&subnet| subnet.to_owned()).collect(),
            description: (name == "a").then(|| v1::NodeDescription {
                probes: Some(v1::ProbeReport { lifecycle: true, ..Default::default() }),
                ..Default::default()
            }),
            ..Default::default()
        };
        let nodes = vec![
            node("a", v1::NodeStatus::Ready, "ssd", &["10.0.0.0/24", "fd00::/64"]),
            node("b", v1::NodeStatus::Down, "hdd", &[]),
        ];
        let filters = filters.iter().map(|filter| filter.parse().expect("a filter")).collect();
        let arguments = ListArguments { format: FormatArguments { format: Format::Json }, filters };
        let kept = arguments.apply(nodes).map_err(|error| error.to_string())?;
        Ok(kept.into_iter().map(|node| node.id).collect())
    }

    #[test]
    fn what_is_listed_may_be_filtered_by_any_field() {
        let kept: [(&[&str], &[&str]); 12] = [
            (&[], &["a", "b"]),
            (&["id=b"], &["b"]),
            (&["status=down"], &["b"]),
            (&["status=NODE_STATUS_DOWN"], &["b"]),
            (&["status!=down"], &["a"]),
            (&["containers=3"], &["a", "b"]),
            (&["labels.example.org/disk=ssd"], &["a"]),
            (&["labels.nothing="], &["a", "b"]),
            (&["subnets=fd00::/64"], &["a"]),
            // What a message does not say is what nothing stands for.
            (&["description.probes.lifecycle=false"], &["b"]),
            (&["containers=3", "status=ready"], &["a"]),
            (&["id=a", "id=b"], &[]),
        ];
        for (filters, kept) in kept {
            assert_eq!(names(filters).unwrap(), kept, "{filters:?}");
        }
        let refused = [
            ("stat=down", "there is no field \"stat\"; there are id, version, "),
            ("status=dwon", "\"dwon\" is none of unspecified, ready, down"),
            ("description=x", "description is no value; it has the fields hostname, "),
            ("labels=x", "labels has several values; say which, as labels.KEY"),
            ("id.x=y", "id has no fields"),
        ];
        for (filter, why) in refused {
            let said = names(&[filter]).unwrap_err();
            assert!(said.contains(why), "{filter}: {said}");
        }
        assert!("status".parse::<Filter>().is_err());
    }

    /// Of no service's ports it can be said that one has no such field.
    #[test]
    fn a_wrong_name_is_wrong_for_an_empty_list_as_well() {
        let arguments = |filter: &str| ListArguments {
            format: FormatArguments { format: Format::Json },
            filters: vec![filter.parse().expect("a filter")],
        };
        let services = || vec![v1::Service::default()];
        assert!(arguments("spec.ports.nothing=1").apply(services()).is_err());
        assert!(arguments("nothing=1").apply(Vec::<v1::Service>::new()).is_err());
        assert!(arguments("spec.name=").apply(services()).is_ok_and(|kept| kept.len() == 1));
    }
}
