//! What the kernel programs and the agent have in common: the layout of every map value and ring record, and the
//! integer arithmetic of the histograms.
//!
//! Everything here is plain old data without padding holes, because its bytes cross the kernel boundary, and free of
//! `std`, because the programs have none. The programs themselves are the binary `warren-probes` of this package.
#![no_std]

#[cfg(test)]
extern crate std;

pub mod abi;
pub mod histogram;
