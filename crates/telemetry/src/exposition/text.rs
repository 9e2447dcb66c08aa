//! Prometheus's text format, version 0.0.4.

use std::fmt::Write as _;

use crate::{
    family::{Family, Value},
    table::Kind,
};

pub(super) fn encode(families: &[Family]) -> String {
    let mut out = String::with_capacity(families.len() * 256);
    for family in families {
        let name = family.metric.name;
        line(&mut out, format_args!("# HELP {name} {}", escape_help(family.metric.help)));
        line(&mut out, format_args!("# TYPE {name} {}", family.metric.kind));
        for point in &family.points {
            match &point.value {
                Value::Number(value) => {
                    line(&mut out, format_args!("{name}{} {}", labels(&point.labels, None), number(*value)));
                }
                Value::Histogram { count, sum, buckets, .. } => {
                    for (bound, cumulative) in buckets {
                        let labels = labels(&point.labels, Some(&number_as_float(*bound)));
                        line(&mut out, format_args!("{name}_bucket{labels} {cumulative}"));
                    }
                    let infinite = labels(&point.labels, Some("+Inf"));
                    line(&mut out, format_args!("{name}_bucket{infinite} {count}"));
                    let labels = labels(&point.labels, None);
                    line(&mut out, format_args!("{name}_sum{labels} {}", number(*sum)));
                    line(&mut out, format_args!("{name}_count{labels} {count}"));
                }
            }
        }
        debug_assert!(family.metric.kind != Kind::Histogram || !family.metric.buckets.is_empty());
    }
    out
}

fn line(out: &mut String, text: std::fmt::Arguments<'_>) {
    writeln!(out, "{text}").expect("writing to a string cannot fail");
}

fn labels(labels: &[(String, String)], bound: Option<&str>) -> String {
    if labels.is_empty() && bound.is_none() {
        return String::new();
    }
    let pairs = labels.iter().map(|(name, value)| format!("{name}=\"{}\"", escape_label(value)));
    let bound = bound.map(|bound| format!("le=\"{bound}\""));
    format!("{{{}}}", pairs.chain(bound).collect::<Vec<_>>().join(","))
}

fn escape_help(text: &str) -> String {
    text.replace('\\', r"\\").replace('\n', r"\n")
}

fn escape_label(text: &str) -> String {
    escape_help(text).replace('"', "\\\"")
}

fn number(value: f64) -> String {
    if value.is_nan() {
        "NaN".to_owned()
    } else if value.is_infinite() {
        if value > 0.0 { "+Inf" } else { "-Inf" }.to_owned()
    } else {
        value.to_string()
    }
}

/// A bucket's bound as Prometheus itself writes it when it reads the protobuf format (Go's `%g`, always a float): the two
/// formats must name the same series.
fn number_as_float(value: f64) -> String {
    let exponent = if value == 0.0 { 0 } else { value.abs().log10().floor() as i32 };
    if (-5..21).contains(&exponent) && exponent > -5 {
        let plain = value.to_string();
        return if plain.contains('.') { plain } else { format!("{plain}.0") };
    }
    let scientific = format!("{value:e}");
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let (sign, digits) = exponent.strip_prefix('-').map_or(('+', exponent), |digits| ('-', digits));
    format!("{mantissa}e{sign}{digits:0>2}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_written_as_prometheus_does() {
        for (bound, text) in [
            (1.0, "1.0"),
            (0.5, "0.5"),
            (512.0, "512.0"),
            (0.0009765625, "0.0009765625"),
            (0.0001220703125, "0.0001220703125"),
            (0.000030517578125, "3.0517578125e-05"),
            (0.00006103515625, "6.103515625e-05"),
            (0.00001, "1e-05"),
            (0.00005, "5e-05"),
            (0.0001, "0.0001"),
        ] {
            assert_eq!(number_as_float(bound), text);
        }
    }
}
