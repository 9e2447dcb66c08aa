use proptest::prelude::*;

use super::{
    Format,
    protobuf::{convert, spans},
    text,
};
use crate::{
    family::assemble,
    series::{Exponential, Measurement, Series},
};

/// What Prometheus 2.42 sends with native histograms on, and without.
const ACCEPT_NATIVE: &str = "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited,\
    application/openmetrics-text;version=1.0.0;q=0.8,text/plain;version=0.0.4;q=0.5,*/*;q=0.1";
const ACCEPT_TEXT: &str = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5,*/*;q=0.1";

#[test]
fn protobuf_is_for_who_asks() {
    assert_eq!(Format::negotiate(ACCEPT_NATIVE), Format::Protobuf);
    assert_eq!(Format::negotiate(ACCEPT_TEXT), Format::Text);
    assert_eq!(Format::negotiate(""), Format::Text);
    assert_eq!(Format::negotiate("text/html, */*;q=0.8"), Format::Text);
}

fn stop_durations() -> Vec<crate::Family> {
    let histogram = Exponential { scale: 3, offset: -1, buckets: vec![2, 0, 1], sum: 3.5 };
    let series = Series::new(
        "warren_container_stop_duration_seconds",
        &[("source", "kernel"), ("node", "a\"b")],
        Measurement::Histogram(histogram),
    );
    assemble(Vec::new(), vec![series], |metric| metric.name == "warren_container_stop_duration_seconds")
}

#[test]
fn text_has_cumulative_buckets_and_escaped_labels() {
    let text = text::encode(&stop_durations());
    for line in [
        "# TYPE warren_container_stop_duration_seconds histogram",
        r#"warren_container_stop_duration_seconds_bucket{node="a\"b",source="kernel",le="0.5"} 0"#,
        r#"warren_container_stop_duration_seconds_bucket{node="a\"b",source="kernel",le="1.0"} 2"#,
        r#"warren_container_stop_duration_seconds_bucket{node="a\"b",source="kernel",le="2.0"} 3"#,
        r#"warren_container_stop_duration_seconds_bucket{node="a\"b",source="kernel",le="+Inf"} 3"#,
        r#"warren_container_stop_duration_seconds_sum{node="a\"b",source="kernel"} 3.5"#,
        r#"warren_container_stop_duration_seconds_count{node="a\"b",source="kernel"} 3"#,
    ] {
        assert!(text.lines().any(|l| l == line), "{line} is missing from\n{text}");
    }
}

#[test]
fn protobuf_counts_what_its_native_buckets_hold() {
    let family = convert(&stop_durations()[0]);
    let histogram = family.metric[0].histogram.as_ref().expect("a histogram");
    assert_eq!(histogram.schema, 3);
    // OpenTelemetry's buckets -1 and 1 are Prometheus's 0 and 2.
    assert_eq!(histogram.positive_span[0].offset, 0);
    assert_eq!(total(&histogram.positive_delta), histogram.sample_count);
}

#[test]
fn families_without_points_are_declared() {
    let families = assemble(Vec::new(), Vec::new(), |_| true);
    let text = text::encode(&families);
    for metric in crate::table::METRICS {
        assert!(text.contains(&format!("# TYPE {} {}", metric.name, metric.kind)), "{}", metric.name);
        if metric.labels.is_empty() {
            assert!(text.contains(&format!("\n{}", metric.name)), "{} has no zero", metric.name);
        }
    }
}

fn total(deltas: &[i64]) -> u64 {
    let mut current = 0;
    deltas
        .iter()
        .map(|delta| {
            current += delta;
            u64::try_from(current).expect("bucket counts are not negative")
        })
        .sum()
}

proptest! {
    #[test]
    fn spans_hold_every_bucket(first in -200i32..200, counts in prop::collection::vec(prop_oneof![Just(0u64), 1u64..1000], 0..60)) {
        let (spans, deltas) = spans(first, &counts);
        let mut decoded = std::collections::BTreeMap::new();
        let mut deltas = deltas.into_iter();
        let mut index = 0;
        let mut current = 0;
        for span in spans {
            index += span.offset;
            for _ in 0..span.length {
                current += deltas.next().expect("a delta for every bucket");
                if current != 0 { decoded.insert(index, current as u64); }
                index += 1;
            }
        }
        prop_assert!(deltas.next().is_none());
        let expected = (first..).zip(counts).filter(|(_, count)| *count != 0).collect();
        prop_assert_eq!(decoded, expected);
    }
}
