//! What flags and files say in words: amounts, pairs, mounts.

use warren_proto::v1;

/// `name=value`.
pub fn pair(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or_else(|| format!("{text:?} is not name=value"))?;
    Ok((name.to_owned(), value.to_owned()))
}

/// Cores as thousandths.
pub fn millis(text: &str) -> Result<i64, String> {
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
pub fn memory(text: &str) -> Result<i64, String> {
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

/// `NAME=SOFT` or `NAME=SOFT:HARD`.
pub fn ulimit(text: &str) -> Result<(String, v1::Ulimit), String> {
    let wrong = || format!("{text:?} is not NAME=SOFT or NAME=SOFT:HARD");
    let (name, limits) = text.split_once('=').ok_or_else(wrong)?;
    let (soft, hard) = limits.split_once(':').unwrap_or((limits, limits));
    let number = |text: &str| text.parse::<i64>().map_err(|_| wrong());
    Ok((name.to_owned(), v1::Ulimit { soft: number(soft)?, hard: number(hard)? }))
}

/// `SOURCE`, `SOURCE:TARGET` or `SOURCE:TARGET:PERMISSIONS`.
pub fn device(text: &str) -> Result<v1::Device, String> {
    let mut parts = text.split(':').map(str::to_owned);
    let mut next = || parts.next().unwrap_or_default();
    let device = v1::Device { source: next(), target: next(), permissions: next() };
    if parts.next().is_some() { Err(format!("{text:?} is not SOURCE[:TARGET[:rwm]]")) } else { Ok(device) }
}

/// `type=bind,source=/srv,target=/data,readonly`, with Docker's names for the options; a volume unless the type says otherwise.
pub fn mount(text: &str) -> Result<v1::Mount, String> {
    let mut mount = v1::Mount::default();
    for option in text.split(',') {
        let (name, value) = option.split_once('=').map_or((option, None), |(name, value)| (name, Some(value)));
        let required = || value.map(str::to_owned).ok_or_else(|| format!("{name} needs a value"));
        match name {
            "type" => {
                mount.r#type = match value {
                    Some("bind") => v1::MountType::Bind.into(),
                    Some("tmpfs") => v1::MountType::Tmpfs.into(),
                    Some("volume") => v1::MountType::Volume.into(),
                    _ => return Err(format!("{option:?}: a mount's type is volume, bind or tmpfs")),
                };
            }
            "source" | "src" => mount.source = required()?,
            "target" | "dst" | "destination" => mount.target = required()?,
            "readonly" | "ro" => {
                mount.read_only = match value {
                    None | Some("true" | "1") => true,
                    Some("false" | "0") => false,
                    Some(_) => return Err(format!("{option:?}: it is readonly, or readonly=true or =false")),
                };
            }
            "size" | "tmpfs-size" => mount.size_bytes = memory(&required()?)?,
            "mode" | "tmpfs-mode" => {
                let mode = u32::from_str_radix(&required()?, 8);
                mount.mode = mode.map_err(|_| format!("{option:?}: a mode is an octal number"))?;
            }
            _ => return Err(format!("{option:?} is no option of a mount")),
        }
    }
    if mount.target.is_empty() {
        return Err("a mount needs a target".to_owned());
    }
    // As Docker has it.
    if mount.r#type() == v1::MountType::Unspecified {
        mount.r#type = v1::MountType::Volume.into();
    }
    Ok(mount)
}

/// `8080:80`, `8080:80/udp`, either with options behind it, like `8080:80,mode=host`, or Docker's long form.
pub fn port(text: &str) -> Result<v1::Port, String> {
    let wrong = || format!("{text:?} is not PUBLISHED:TARGET[/PROTOCOL], nor options like published=8080,target=80");
    let number = |text: &str| text.parse::<u16>().map(u32::from).map_err(|_| wrong());
    let protocol = |text: &str| match text {
        "tcp" => Ok(v1::Protocol::Tcp.into()),
        "udp" => Ok(v1::Protocol::Udp.into()),
        _ => Err(format!("{text:?} is not a protocol: tcp or udp")),
    };
    let mut port = v1::Port::default();
    let mut options = text.split(',').peekable();
    if let Some(short) = options.next_if(|first| !first.contains('=')) {
        let (ports, name) = short.split_once('/').unwrap_or((short, "tcp"));
        let (published, target) = ports.split_once(':').ok_or_else(wrong)?;
        (port.host_port, port.container_port) = (number(published)?, number(target)?);
        port.protocol = protocol(name)?;
    }
    for option in options {
        match option.split_once('=').ok_or_else(wrong)? {
            ("published", value) => port.host_port = number(value)?,
            ("target", value) => port.container_port = number(value)?,
            ("name", value) => port.name = value.to_owned(),
            ("protocol", value) => port.protocol = protocol(value)?,
            ("mode", "host") => port.publish_mode = v1::PublishMode::Host.into(),
            ("mode", "ingress") => port.publish_mode = v1::PublishMode::Ingress.into(),
            ("mode", _) => return Err(format!("{option:?}: a port's mode is ingress or host")),
            _ => return Err(format!("{option:?} is no option of a port")),
        }
    }
    Ok(port)
}

/// `name`, or `source=name,target=file,mode=0400,uid=www-data,gid=33,on-update=signal,signal=HUP`, or `source=name,env=VARIABLE`.
pub fn secret(text: &str) -> Result<v1::SecretMount, String> {
    let mut mount = v1::SecretMount { on_update: v1::OnUpdate::Restart.into(), ..Default::default() };
    if !text.contains('=') {
        mount.source = text.to_owned();
        return Ok(mount);
    }
    for option in text.split(',') {
        let (name, value) = option.split_once('=').ok_or_else(|| format!("{option:?} is not name=value"))?;
        match name {
            "source" | "src" => mount.source = value.to_owned(),
            "target" => mount.target = value.to_owned(),
            "env" if value.is_empty() => return Err(format!("{option:?} names no variable")),
            "env" => mount.env = value.to_owned(),
            "mode" => {
                let mode = u32::from_str_radix(value, 8);
                mount.mode = mode.map_err(|_| format!("{option:?}: a mode is an octal number"))?;
            }
            "uid" | "user" => mount.user = value.to_owned(),
            "gid" | "group" => mount.group = value.to_owned(),
            "signal" => mount.signal = value.to_owned(),
            "on-update" => {
                mount.on_update = match value {
                    "none" => v1::OnUpdate::None.into(),
                    "signal" => v1::OnUpdate::Signal.into(),
                    "restart" => v1::OnUpdate::Restart.into(),
                    _ => return Err(format!("{option:?}: none, signal or restart")),
                };
            }
            _ => return Err(format!("{option:?} is no option of a secret")),
        }
    }
    Ok(mount)
}

/// `http://:80/path`, `https://...`, `tcp://:80`, `grpc://:80/service`, `exec:command`.
pub fn health(text: &str) -> Result<v1::health_check::Check, String> {
    use v1::health_check::Check;

    if let Some(command) = text.strip_prefix("exec:").filter(|command| !command.trim().is_empty()) {
        let command = ["/bin/sh", "-c", command].map(str::to_owned).into();
        return Ok(Check::Exec(v1::ExecCheck { command }));
    }
    let wrong =
        || format!("{text:?} is no check: http://:8080/path, https://, tcp://:5432, grpc://:50051 or exec:COMMAND");
    let (scheme, rest) = text.split_once("://:").ok_or_else(wrong)?;
    let (port, path) = rest.find('/').map_or((rest, ""), |at| rest.split_at(at));
    let port = port.parse::<u16>().map(u32::from).map_err(|_| wrong())?;
    match scheme {
        "http" | "https" => {
            let tls = scheme == "https";
            Ok(Check::Http(v1::HttpCheck { port, path: path.to_owned(), tls, ..Default::default() }))
        }
        "tcp" if path.is_empty() => Ok(Check::Tcp(v1::TcpCheck { port })),
        "grpc" => Ok(Check::Grpc(v1::GrpcCheck { port, service: path.trim_start_matches('/').to_owned() })),
        _ => Err(wrong()),
    }
}

/// The same for what only this program waits for.
pub fn std_duration(text: &str) -> Result<std::time::Duration, String> {
    let wire = duration(text)?;
    Ok(std::time::Duration::new(wire.seconds.unsigned_abs(), wire.nanos.unsigned_abs()))
}

/// Whole seconds, of what [`duration`] takes; parts of one count as one.
pub fn seconds(text: &str) -> Result<u64, String> {
    let duration = std_duration(text)?;
    let seconds = duration.as_secs() + u64::from(duration.subsec_nanos() > 0);
    /// A year.
    const MOST: u64 = 31_536_000;
    if seconds <= MOST { Ok(seconds) } else { Err(format!("{text:?} is more than a year")) }
}

/// `10s`, `500ms`, `2m`, `1h30m`, `7d`; a number alone is seconds.
pub fn duration(text: &str) -> Result<pbjson_types::Duration, String> {
    let wrong = || format!("{text:?} is not a duration like 10s, 500ms, 2m, 1h30m or 7d");
    let (mut rest, mut seconds) = (text, 0.0);
    while !rest.is_empty() {
        let unit = rest.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(rest.len());
        let (digits, behind) = rest.split_at(unit);
        let end = behind.find(|c: char| !c.is_ascii_alphabetic()).unwrap_or(behind.len());
        let (unit, next) = behind.split_at(end);
        let factor = match unit {
            "ms" => 0.001,
            "s" => 1.0,
            // Alone.
            "" if digits.len() == text.len() => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            "d" => 86_400.0,
            _ => return Err(wrong()),
        };
        let number = digits.parse::<f64>().ok().filter(|number| *number >= 0.0).ok_or_else(wrong)?;
        seconds += number * factor;
        rest = next;
    }
    if text.is_empty() || !(0.0..1e9).contains(&seconds) {
        return Err(wrong());
    }
    let nanos = ((seconds.fract() * 1e9).round() as i32).min(999_999_999);
    Ok(pbjson_types::Duration { seconds: seconds.trunc() as i64, nanos })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_parsed() {
        assert_eq!(memory("64M"), Ok(64 << 20));
        assert_eq!(memory("1GiB"), Ok(1 << 30));
        assert_eq!(memory("512"), Ok(512));
        assert_eq!(memory("64Mi"), Ok(64 << 20));
        assert_eq!(memory("1.5G"), Ok(3 << 29));
        assert_eq!(memory("1T"), Ok(1 << 40));
        for wrong in ["lots", "0.0001K", "1P", "infG", "", "99999999999999G"] {
            assert!(memory(wrong).is_err(), "{wrong:?}");
        }
        assert_eq!(millis("0.5"), Ok(500));
        for wrong in ["-1", "0.0001", "NaN"] {
            assert!(millis(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn checks_and_durations_are_parsed() {
        use v1::health_check::Check;

        let http = |port, path: &str, tls| {
            Ok(Check::Http(v1::HttpCheck { port, path: path.to_owned(), tls, ..Default::default() }))
        };
        assert_eq!(health("http://:80/up?x=1"), http(80, "/up?x=1", false));
        assert_eq!(health("https://:443"), http(443, "", true));
        assert_eq!(health("tcp://:5432"), Ok(Check::Tcp(v1::TcpCheck { port: 5432 })));
        let grpc = v1::GrpcCheck { port: 1, service: "a.B".to_owned() };
        assert_eq!(health("grpc://:1/a.B"), Ok(Check::Grpc(grpc)));
        assert!(matches!(health("exec:true"), Ok(Check::Exec(exec)) if exec.command == ["/bin/sh", "-c", "true"]));
        for wrong in ["", "http://web:80", "tcp://:80/x", "ftp://:21", "http://:99999"] {
            assert!(health(wrong).is_err(), "{wrong:?}");
        }
        let parsed = |text| duration(text).map(|d| (d.seconds, d.nanos));
        assert_eq!(parsed("10s"), Ok((10, 0)));
        assert_eq!(parsed("7d"), Ok((604_800, 0)));
        assert_eq!(parsed("500ms"), Ok((0, 500_000_000)));
        assert_eq!((parsed("2m"), parsed("3")), (Ok((120, 0)), Ok((3, 0))));
        assert_eq!((parsed("1h30m"), parsed("1m500ms")), (Ok((5400, 0)), Ok((60, 500_000_000))));
        for wrong in ["soon", "-1s", "1w", "", "s", "1h30", "1 s", "NaN", "1h-5m", "1e12"] {
            assert!(duration(wrong).is_err(), "{wrong:?}");
        }
        assert_eq!((seconds("60"), seconds("2m"), seconds("1.2s")), (Ok(60), Ok(120), Ok(2)));
        assert!(seconds("400d").is_err());
    }

    #[test]
    fn ports_are_parsed() {
        let tcp =
            v1::Port { container_port: 80, host_port: 8080, protocol: v1::Protocol::Tcp.into(), ..Default::default() };
        assert_eq!(port("8080:80"), Ok(tcp.clone()));
        assert_eq!(port("8080:80/udp"), Ok(v1::Port { protocol: v1::Protocol::Udp.into(), ..tcp.clone() }));
        let host = v1::Port { name: "http".to_owned(), publish_mode: v1::PublishMode::Host.into(), ..tcp };
        assert_eq!(port("published=8080,target=80,protocol=tcp,mode=host,name=http"), Ok(host));
        for wrong in ["", "80", "80:x", "70000:80", "80:80/sctp", "target=80,mode=mesh", "target=80,colour=red"] {
            assert!(port(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn mounts_devices_and_limits_are_parsed() {
        let tmpfs = v1::Mount {
            r#type: v1::MountType::Tmpfs.into(),
            target: "/tmp".to_owned(),
            size_bytes: 64 << 20,
            mode: 0o1777,
            ..Default::default()
        };
        assert_eq!(mount("type=tmpfs,target=/tmp,size=64M,mode=1777"), Ok(tmpfs));
        let bind = v1::Mount {
            r#type: v1::MountType::Bind.into(),
            source: "/a".to_owned(),
            target: "/b".to_owned(),
            read_only: true,
            ..Default::default()
        };
        assert_eq!(mount("type=bind,src=/a,dst=/b,ro"), Ok(bind));
        let kept = v1::Mount {
            r#type: v1::MountType::Volume.into(),
            source: "keep".to_owned(),
            target: "/data".to_owned(),
            ..Default::default()
        };
        assert_eq!(mount("source=keep,target=/data"), Ok(kept));
        assert_eq!(
            port("published=80,target=80,mode=foo"),
            Err("\"mode=foo\": a port's mode is ingress or host".to_owned())
        );
        for wrong in ["", "type=nfs,target=/a", "type=bind", "target", "target=/a,mode=9", "target=/a,colour=red"] {
            assert!(mount(wrong).is_err(), "{wrong:?}");
        }
        let null = v1::Device { source: "/dev/null".to_owned(), ..Default::default() };
        assert_eq!(device("/dev/null"), Ok(null.clone()));
        let null = v1::Device { target: "/dev/x".to_owned(), permissions: "r".to_owned(), ..null };
        assert_eq!(device("/dev/null:/dev/x:r"), Ok(null));
        assert!(device("/a:/b:r:x").is_err());
        assert_eq!(ulimit("nofile=1:2"), Ok(("nofile".to_owned(), v1::Ulimit { soft: 1, hard: 2 })));
        assert_eq!(ulimit("core=-1"), Ok(("core".to_owned(), v1::Ulimit { soft: -1, hard: -1 })));
        assert!(ulimit("nofile").is_err() && ulimit("nofile=x").is_err());
    }
}
