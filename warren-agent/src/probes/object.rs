/// The kernel programs, as `cargo xtask build-ebpf` built them; empty if it has not.
pub static OBJECT: &[u8] = {
    // ELF parsing reads aligned words.
    #[repr(C, align(8))]
    struct Aligned<T: ?Sized>(T);
    static ALIGNED: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/probes.o")));
    &ALIGNED.0
};
