//! Base-2 exponential histograms of durations, in integers only.
//!
//! OpenTelemetry's scale 3 and Prometheus's schema 3 put bucket boundaries at `2^(n/8)` **in the metric's unit**, which
//! is the second. Nanoseconds do not land on that grid (1e-9 is no power of two), so a duration is first converted to
//! units of 2^-38 s by an integer multiplication and then indexed; the slots are then exactly the exporters' buckets.

/// Resolution: eight buckets an octave (OpenTelemetry's scale, Prometheus's schema).
pub const SCALE: i32 = 3;
/// Buckets an octave at [`SCALE`].
const PER_OCTAVE: i32 = 1 << SCALE;
/// Durations are indexed in units of `2^-GRID_BITS` seconds.
const GRID_BITS: i32 = 38;
/// OpenTelemetry's index of slot 0: bucket `i` holds `(2^(i/8), 2^((i+1)/8)]` seconds, so slot 0 ends just above 2^-20 s
/// (0.95 us). Shorter durations are clamped into it.
pub const FIRST_INDEX: i32 = -20 * PER_OCTAVE;
/// Slots of a histogram: 30 octaves, up to 2^10 s. Longer durations are clamped into the last.
pub const SLOTS: usize = 240;

/// A histogram as the kernel keeps it. The count is the sum of the slots: keeping it apart would let a reader see it
/// torn from them, and a scraper refuses a histogram that disagrees with itself.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Histogram {
    /// Sum of the observed durations, in nanoseconds.
    pub sum_ns: u64,
    /// Observations by slot; see [`slot`].
    pub slots: [u64; SLOTS],
}

impl Histogram {
    /// A histogram that has observed nothing.
    pub const EMPTY: Self = Self { sum_ns: 0, slots: [0; SLOTS] };

    /// How many durations were observed.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.slots.iter().sum()
    }

    /// Observes one duration. The kernel does the same with atomic additions.
    pub fn observe(&mut self, ns: u64) {
        self.sum_ns += ns;
        self.slots[slot(ns)] += 1;
    }

    /// Adds all of `other`'s observations.
    pub fn merge(&mut self, other: &Self) {
        self.sum_ns += other.sum_ns;
        for (mine, theirs) in self.slots.iter_mut().zip(&other.slots) {
            *mine += theirs;
        }
    }
}

/// `floor(2^60 / 1e9)`: nanoseconds to units of 2^-38 s is a multiplication by 2^38/1e9 = this / 2^22. The relative
/// error of the constant is 5e-10, far below a bucket's width of 9 %; rounding down keeps whole seconds, which end a
/// bucket, inside it.
const NS_TO_GRID: u64 = 1_152_921_504;
/// Above this the product would leave 64 bits, and ten low bits (a microsecond in 8 s) are given up first.
const FINE_LIMIT_NS: u64 = 1 << 33;
/// Longest duration told apart: 2.4 hours, beyond the last slot.
const MAX_NS: u64 = (1 << 43) - 1;

/// Converts nanoseconds to units of 2^-38 s.
#[inline(always)]
fn to_grid(ns: u64) -> u64 {
    if ns < FINE_LIMIT_NS {
        (ns * NS_TO_GRID) >> 22
    } else {
        let ns = if ns > MAX_NS { MAX_NS } else { ns };
        ((ns >> 10) * NS_TO_GRID) >> 12
    }
}

/// Where the seven inner boundaries of an octave lie: `floor((2^(j/8) - 1) * 2^32)` for j = 1..=7.
const THRESHOLDS: [u64; 7] =
    [388_727_751, 812_638_371, 1_274_916_179, 1_779_033_703, 2_328_777_762, 2_928_277_909, 3_582_037_455];

/// 1 when `a > b`, else 0; both below 2^63.
///
/// The verifier walks every branch, and the thirteen comparisons of an index would give it 2^13 paths (177 825 verified
/// instructions when written with `if`). BPF has no set-on-condition, so LLVM turns any branch-free idiom it recognises
/// back into a jump; passing the difference through a volatile stack slot hides it. It costs about 1 ns.
#[inline(always)]
fn greater(a: u64, b: u64) -> u64 {
    let difference = b.wrapping_sub(a);
    // SAFETY: a valid, initialised local.
    unsafe { core::ptr::read_volatile(&difference) >> 63 }
}

/// OpenTelemetry's bucket index at scale 3 of an integer `1 <= v < 2^63`. Buckets include their upper bound.
#[inline(always)]
fn exponential_index(v: u64) -> i32 {
    let mut rest = v;
    let mut exponent = 0;
    // floor(log2 v): BPF has no count-leading-zeros instruction before v4 of its instruction set.
    let step = greater(rest, 0xffff_ffff) << 5;
    exponent += step;
    rest >>= step;
    let step = greater(rest, 0xffff) << 4;
    exponent += step;
    rest >>= step;
    let step = greater(rest, 0xff) << 3;
    exponent += step;
    rest >>= step;
    let step = greater(rest, 0xf) << 2;
    exponent += step;
    rest >>= step;
    let step = greater(rest, 0x3) << 1;
    exponent += step;
    rest >>= step;
    exponent += greater(rest, 1);

    // The fraction below the leading one, left-aligned in 63 bits. The mask tells the verifier the shift is in range.
    let fraction = (v << ((63 - exponent) & 63)) & (u64::MAX >> 1);
    let high = fraction >> 31;
    let mut sub = 0;
    sub += greater(high, THRESHOLDS[0]);
    sub += greater(high, THRESHOLDS[1]);
    sub += greater(high, THRESHOLDS[2]);
    sub += greater(high, THRESHOLDS[3]);
    sub += greater(high, THRESHOLDS[4]);
    sub += greater(high, THRESHOLDS[5]);
    sub += greater(high, THRESHOLDS[6]);
    let is_power_of_two = 1 - greater(fraction, 0);
    ((exponent << SCALE) + sub) as i32 - is_power_of_two as i32
}

/// The slot of [`Histogram::slots`] that a duration belongs to.
#[inline(always)]
#[must_use]
pub fn slot(ns: u64) -> usize {
    let v = to_grid(ns);
    let v = if v == 0 { 1 } else { v };
    let slot = exponential_index(v) - GRID_BITS * PER_OCTAVE - FIRST_INDEX;
    let slot = if slot < 0 { 0 } else { slot as usize };
    if slot >= SLOTS { SLOTS - 1 } else { slot }
}

#[cfg(test)]
mod tests;
