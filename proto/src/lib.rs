//! Warren's wire contract: the gRPC package `warren.v1`, its messages with their canonical JSON form, its clients and
//! servers. The `.proto` files beside this crate are the documentation of each.

/// The only version of the contract so far.
pub mod v1 {
    #![expect(missing_docs, reason = "generated; the .proto files hold the documentation")]

    tonic::include_proto!("warren.v1");
    include!(concat!(env!("OUT_DIR"), "/warren.v1.serde.rs"));
}

/// What gRPC reflection serves.
pub const FILE_DESCRIPTOR_SET: &[u8] = tonic::include_file_descriptor_set!("descriptors");
