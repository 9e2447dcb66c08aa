//! `warren service ...`

use clap::{Args, Subcommand, ValueEnum};
use warren_proto::v1::{self, service_spec::Mode};

use crate::{
    client::{ClientArguments, all_pages},
    container,
    error::Error,
    output::{self, Format, FormatArguments, say},
    wait::{self, Follower, WaitArguments},
};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Creates a service.
    Create(Box<CreateArguments>),
    /// Lists services.
    #[command(alias = "list")]
    Ls {
        #[command(flatten)]
        format: FormatArguments,
    },
    /// Shows one service.
    Inspect {
        /// Name, id, or unique beginning of an id.
        service: String,
        #[command(flatten)]
        format: FormatArguments,
    },
    /// Lists a service's containers, ended ones included.
    Ps {
        /// Name, id, or unique beginning of an id.
        service: String,
        #[command(flatten)]
        format: FormatArguments,
    },
    /// Changes the number of a service's containers.
    Scale {
        /// Name, id, or unique beginning of an id.
        service: String,
        /// How many.
        #[arg(allow_negative_numbers = true)]
        replicas: i64,
        #[command(flatten)]
        wait: WaitArguments,
    },
    /// Removes services and their containers.
    Rm {
        /// Names, ids, or unique beginnings of ids.
        #[arg(required = true)]
        services: Vec<String>,
        #[command(flatten)]
        wait: WaitArguments,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Restart {
    /// Whenever it ends.
    Any,
    /// When it fails.
    OnFailure,
    /// Never.
    Never,
}

#[derive(Args, Debug)]
pub(crate) struct CreateArguments {
    /// The service's name: a DNS label.
    name: String,
    /// What to run.
    #[arg(long)]
    image: String,
    /// How many containers.
    #[arg(long, default_value_t = 1, allow_negative_numbers = true, conflicts_with = "global")]
    replicas: i64,
    /// One container on every node.
    #[arg(long)]
    global: bool,
    /// Replaces the image's entrypoint; repeat for each word.
    #[arg(long)]
    command: Vec<String>,
    /// A variable, as NAME=value; may be repeated.
    #[arg(long, short, value_parser = pair)]
    env: Vec<(String, String)>,
    /// A label, as name=value; may be repeated.
    #[arg(long, value_parser = pair)]
    label: Vec<(String, String)>,
    /// Cores that a container may use at most.
    #[arg(long, value_parser = millis)]
    limit_cpu: Option<i64>,
    /// Memory that a container may use at most, like 64M or 1G.
    #[arg(long, value_parser = memory)]
    limit_memory: Option<i64>,
    /// Cores set aside for each container.
    #[arg(long, value_parser = millis)]
    reserve_cpu: Option<i64>,
    /// Memory set aside for each container, like 64M or 1G.
    #[arg(long, value_parser = memory)]
    reserve_memory: Option<i64>,
    /// When a container that ended is replaced.
    #[arg(long, value_enum, default_value = "any")]
    restart: Restart,
    /// Milliseconds before the first replacement; doubles with each failure in a row.
    #[arg(long)]
    restart_delay_ms: Option<u64>,
    /// Failures in a row after which a container is no longer replaced; 0 is never.
    #[arg(long, default_value_t = 0)]
    restart_max_attempts: u32,
    /// The signal that stops a container; the image's, or SIGTERM, unless given.
    #[arg(long, default_value = "")]
    stop_signal: String,
    /// Seconds from that signal to SIGKILL; 10 unless given.
    #[arg(long)]
    stop_timeout: Option<u64>,
    #[command(flatten)]
    wait: WaitArguments,
    /// Replaces the image's command.
    #[arg(last = true)]
    args: Vec<String>,
}

fn pair(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or_else(|| format!("{text:?} is not name=value"))?;
    Ok((name.to_owned(), value.to_owned()))
}

/// Cores as thousandths.
fn millis(text: &str) -> Result<i64, String> {
    let cores: f64 = text.parse().map_err(|_| format!("{text:?} is not a number of cores"))?;
    if !cores.is_finite() || cores < 0.0 {
        return Err(format!("{text:?} is not a number of cores"));
    }
    let millis = (cores * 1000.0).round() as i64;
    if cores > 0.0 && millis == 0 {
        return Err(format!("{text:?} is less than a thousandth of a core"));
    }
    Ok(millis)
}

/// Bytes, in powers of 1024: `64M`, `64Mi`, `64MiB` and `0.0625G` are the same.
fn memory(text: &str) -> Result<i64, String> {
    let wrong = || format!("{text:?} is not an amount of memory: use a number with K, M, G, T or nothing behind it");
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let factor: i64 = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "ki" | "kb" | "kib" => 1 << 10,
        "m" | "mi" | "mb" | "mib" => 1 << 20,
        "g" | "gi" | "gb" | "gib" => 1 << 30,
        "t" | "ti" | "tb" | "tib" => 1 << 40,
        _ => return Err(wrong()),
    };
    if let Ok(amount) = digits.parse::<i64>() {
        return amount.checked_mul(factor).ok_or_else(wrong);
    }
    let bytes = digits.parse::<f64>().map_err(|_| wrong())? * factor as f64;
    // A fraction of a byte is a slip of the pen, and beyond 2^53 the number would not be what was written.
    if bytes.fract() == 0.0 && bytes.abs() < 9e15 { Ok(bytes as i64) } else { Err(wrong()) }
}

pub(crate) async fn run(command: Command, client: &ClientArguments) -> Result<(), Error> {
    match command {
        Command::Create(arguments) => create(*arguments, client).await,
        Command::Ls { format } => ls(client, format.format).await,
        Command::Inspect { service, format } => inspect(client, service, format.format).await,
        Command::Ps { service, format } => {
            let (containers, _) = container::list(client, service, String::new()).await?;
            container::show(client, &containers, format.format).await
        }
        Command::Scale { service, replicas, wait } => scale(client, service, replicas, wait).await,
        Command::Rm { services, wait } => {
            // One that is not there keeps none of the others.
            let mut outcome = Ok(());
            for service in services {
                outcome = outcome.and(remove(client, service, wait).await);
            }
            outcome
        }
    }
}

fn spec(arguments: &CreateArguments) -> v1::ServiceSpec {
    let seconds = |seconds: u64| pbjson_types::Duration { seconds: seconds as i64, nanos: 0 };
    let amounts = |cpu: Option<i64>, memory: Option<i64>| {
        Some(v1::ResourceAmounts { cpu_millis: cpu.unwrap_or(0), memory_bytes: memory.unwrap_or(0) })
    };
    let condition = match arguments.restart {
        Restart::Any => v1::RestartCondition::Any,
        Restart::OnFailure => v1::RestartCondition::OnFailure,
        Restart::Never => v1::RestartCondition::Never,
    };
    let delay = arguments
        .restart_delay_ms
        .map(|ms| pbjson_types::Duration { seconds: (ms / 1000) as i64, nanos: (ms % 1000) as i32 * 1_000_000 });
    v1::ServiceSpec {
        name: arguments.name.clone(),
        labels: arguments.label.iter().cloned().collect(),
        mode: Some(if arguments.global {
            Mode::Global(v1::Global {})
        } else {
            Mode::Replicated(v1::Replicated { replicas: arguments.replicas })
        }),
        container: Some(v1::ContainerSpec {
            image: arguments.image.clone(),
            command: arguments.command.clone(),
            args: arguments.args.clone(),
            env: arguments.env.iter().cloned().collect(),
            stop_signal: arguments.stop_signal.clone(),
            stop_timeout: arguments.stop_timeout.map(seconds),
        }),
        resources: Some(v1::Resources {
            reservations: amounts(arguments.reserve_cpu, arguments.reserve_memory),
            limits: amounts(arguments.limit_cpu, arguments.limit_memory),
        }),
        restart: Some(v1::RestartPolicy {
            condition: condition.into(),
            delay,
            max_attempts: arguments.restart_max_attempts,
        }),
    }
}

fn request_id() -> String {
    format!("{:032x}", rand::random::<u128>())
}

async fn create(arguments: CreateArguments, client: &ClientArguments) -> Result<(), Error> {
    if !arguments.stop_signal.is_empty() && warren_agent::runtime::parse_signal(&arguments.stop_signal).is_none() {
        return Err(Error::Usage(format!("--stop-signal: {:?} is not a signal", arguments.stop_signal)));
    }
    arguments.image.parse::<warren_agent::runtime::ImageName>().map_err(|error| Error::Usage(error.to_string()))?;
    let request = v1::CreateServiceRequest { spec: Some(spec(&arguments)), request_id: request_id() };
    let service = client.services().await?.create_service(request).await?.into_inner().service.unwrap_or_default();
    say!("{}", service.id);
    wait::running(client, service, arguments.wait).await
}

pub(crate) async fn get(client: &ClientArguments, service: &str) -> Result<v1::Service, Error> {
    let request = v1::GetServiceRequest { service: service.to_owned() };
    Ok(client.services().await?.get_service(request).await?.into_inner().service.unwrap_or_default())
}

async fn ls(client: &ClientArguments, format: Format) -> Result<(), Error> {
    let mut api = client.services().await?;
    let services = all_pages(async |page_token| {
        let page = api.list_services(v1::ListServicesRequest { page_size: 0, page_token }).await?.into_inner();
        Ok((page.services, page.next_page_token))
    })
    .await?;
    if let Format::Json = format {
        return output::json(&services);
    }
    let row = |service: &v1::Service| {
        let spec = service.spec.clone().unwrap_or_default();
        let status = service.status.unwrap_or_default();
        [
            output::short(&service.id),
            spec.name,
            mode(spec.mode.as_ref()),
            format!("{}/{}", status.running, status.desired),
            spec.container.unwrap_or_default().image,
            output::ago(service.created_at.as_ref()),
        ]
    };
    output::table(["ID", "NAME", "MODE", "RUNNING", "IMAGE", "CREATED"], services.iter().map(row));
    Ok(())
}

fn mode(mode: Option<&Mode>) -> String {
    match mode {
        Some(Mode::Global(_)) => "global".to_owned(),
        _ => "replicated".to_owned(),
    }
}

async fn inspect(client: &ClientArguments, service: String, format: Format) -> Result<(), Error> {
    let service = get(client, &service).await?;
    if let Format::Json = format {
        return output::json(&service);
    }
    let spec = service.spec.unwrap_or_default();
    let status = service.status.unwrap_or_default();
    let container = spec.container.unwrap_or_default();
    let resources = spec.resources.unwrap_or_default();
    let amounts = |amounts: Option<v1::ResourceAmounts>| {
        let amounts = amounts.unwrap_or_default();
        format!("{} millicores, {}", amounts.cpu_millis, output::bytes(amounts.memory_bytes))
    };
    let pairs = |map: &std::collections::BTreeMap<String, String>| {
        map.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(", ")
    };
    output::fields(&[
        ("id", service.id),
        ("name", spec.name),
        ("mode", mode(spec.mode.as_ref())),
        ("running", format!("{} of {}", status.running, status.desired)),
        ("image", container.image),
        ("command", container.command.join(" ")),
        ("args", container.args.join(" ")),
        ("env", pairs(&container.env)),
        ("labels", pairs(&spec.labels)),
        ("reserved", amounts(resources.reservations)),
        ("limits", amounts(resources.limits)),
        ("created", output::ago(service.created_at.as_ref())),
        ("updated", output::ago(service.updated_at.as_ref())),
        ("version", service.version.to_string()),
    ]);
    Ok(())
}

async fn scale(client: &ClientArguments, service: String, replicas: i64, wait: WaitArguments) -> Result<(), Error> {
    let known = get(client, &service).await?;
    let mut spec = known.spec.unwrap_or_default();
    if let Some(Mode::Global(_)) = spec.mode {
        return Err(Error::Usage(format!("{} is a global service: it has one container on every node", spec.name)));
    }
    spec.mode = Some(Mode::Replicated(v1::Replicated { replicas }));
    let request = v1::UpdateServiceRequest {
        service: known.id,
        spec: Some(spec),
        version: known.version,
        request_id: request_id(),
    };
    let updated = client.services().await?.update_service(request).await?.into_inner().service.unwrap_or_default();
    wait::running(client, updated, wait).await
}

async fn remove(client: &ClientArguments, service: String, wait: WaitArguments) -> Result<(), Error> {
    let known = get(client, &service).await?;
    // Before it is deleted: a service that is gone cannot be named.
    let follower = if wait.wait { Some(Follower::start(client, &known.id).await?) } else { None };
    let request = v1::DeleteServiceRequest { service: known.id.clone(), request_id: request_id() };
    client.services().await?.delete_service(request).await?;
    let name = known.spec.unwrap_or_default().name;
    say!("{name}");
    match follower {
        Some(follower) => wait::gone(follower, &name, wait).await,
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_parsed() {
        assert_eq!(memory("64M"), Ok(64 << 20));
        assert_eq!(memory("1GiB"), Ok(1 << 30));
        assert_eq!(memory("512"), Ok(512));
        assert!(memory("lots").is_err());
        assert_eq!(memory("64Mi"), Ok(64 << 20));
        assert_eq!(memory("1.5G"), Ok(3 << 29));
        assert_eq!(memory("1T"), Ok(1 << 40));
        assert!(memory("0.0001K").is_err());
        assert!(memory("1P").is_err());
        assert!(memory("infG").is_err());
        assert!(memory("").is_err());
        assert!(memory("99999999999999G").is_err());
        assert_eq!(millis("0.5"), Ok(500));
        assert!(millis("-1").is_err());
        assert!(millis("0.0001").is_err());
        assert!(millis("NaN").is_err());
    }
}
