//! Chance that is no chance. Hash maps, tokio's and openraft's dice ask the system for randomness, and each other answer would be
//! another run; here the system's answer follows from the seed. The symbol replaces the C library's in this program.

use std::{
    ffi::{c_uint, c_void},
    sync::atomic::{AtomicU64, Ordering},
};

static STATE: AtomicU64 = AtomicU64::new(0);

/// What all randomness follows from. To be called before anything else.
pub(crate) fn seed(seed: u64) {
    STATE.store(seed, Ordering::Relaxed);
}

/// Splitmix64.
fn next() -> u64 {
    let mut x = STATE.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Fills a buffer as getrandom(2) would.
///
/// # Safety
///
/// `buffer` is `len` bytes long, as for the C library's.
// SAFETY: the name is the C library's, and so are the signature and what it does; it is replaced on purpose.
#[unsafe(no_mangle)]
unsafe extern "C" fn getrandom(buffer: *mut c_void, len: usize, _flags: c_uint) -> isize {
    // SAFETY: the caller gives a buffer of this length.
    let buffer = unsafe { std::slice::from_raw_parts_mut(buffer.cast::<u8>(), len) };
    for chunk in buffer.chunks_mut(8) {
        chunk.copy_from_slice(&next().to_le_bytes()[..chunk.len()]);
    }
    len as isize
}
