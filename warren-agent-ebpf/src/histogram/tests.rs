use proptest::prelude::*;

use super::*;

/// The slot by floating point: OpenTelemetry's definition, `ceil(log2(seconds) * 8) - 1`.
fn slot_by_logarithm(ns: u64) -> f64 {
    let seconds = ns.max(1) as f64 / 1e9;
    ((seconds.log2() * 8.0).ceil() - 1.0 - f64::from(FIRST_INDEX)).clamp(0.0, SLOTS as f64 - 1.0)
}

/// Distance of a duration from the nearest bucket boundary, relative.
fn distance_from_boundary(ns: u64) -> f64 {
    let index = (ns.max(1) as f64 / 1e9).log2() * 8.0;
    (index - index.round()).abs() / 8.0 * std::f64::consts::LN_2
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20_000))]

    #[test]
    fn the_slot_is_the_one_floating_point_gives(exponent in 0u32..43, fraction in 0u64..u64::MAX) {
        let ns = (1u64 << exponent) | (fraction & ((1u64 << exponent) - 1));
        // The grid conversion truncates to 2^-38 s and its constant is off by 5e-10: next to a boundary either side
        // is right.
        let tolerance = 4e-9_f64.max(8.0 / (ns as f64 * 274.8));
        prop_assume!(distance_from_boundary(ns) > tolerance);
        prop_assert_eq!(slot(ns) as f64, slot_by_logarithm(ns), "{} ns", ns);
    }

    #[test]
    fn slots_never_fall_as_durations_grow(a in any::<u64>(), b in any::<u64>()) {
        let (low, high) = if a < b { (a, b) } else { (b, a) };
        prop_assert!(slot(low) <= slot(high));
    }

    #[test]
    fn merging_adds_counts_and_sums(left in prop::collection::vec(0u64..1 << 40, 0..40),
                                    right in prop::collection::vec(0u64..1 << 40, 0..40)) {
        let mut both = Histogram::EMPTY;
        let mut a = Histogram::EMPTY;
        let mut b = Histogram::EMPTY;
        for ns in &left { a.observe(*ns); both.observe(*ns); }
        for ns in &right { b.observe(*ns); both.observe(*ns); }
        a.merge(&b);
        prop_assert_eq!(a.count(), (left.len() + right.len()) as u64);
        prop_assert_eq!(a, both);
    }
}

#[test]
fn durations_beyond_the_range_are_clamped() {
    assert_eq!(slot(0), 0);
    assert_eq!(slot(1), 0);
    assert_eq!(slot(1 << 42), SLOTS - 1);
    assert_eq!(slot(u64::MAX), SLOTS - 1);
}

#[test]
fn powers_of_two_seconds_end_their_bucket() {
    // One second is bucket index -1, (2^(-1/8), 1], in OpenTelemetry's upper-inclusive convention.
    assert_eq!(slot(1_000_000_000) as i32 + FIRST_INDEX, -1);
    assert_eq!(slot(1_000_000_001) as i32 + FIRST_INDEX, 0);
    assert_eq!(slot(2_000_000_000) as i32 + FIRST_INDEX, 7);
}
