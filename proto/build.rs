//! Generates the messages, their canonical JSON form, and the gRPC clients and servers.

use std::{env, error::Error, fs, path::PathBuf};

const FILES: [&str; 14] = [
    "warren/v1/cluster.proto",
    "warren/v1/container.proto",
    "warren/v1/event.proto",
    "warren/v1/exec.proto",
    "warren/v1/logs.proto",
    "warren/v1/network.proto",
    "warren/v1/node.proto",
    "warren/v1/operator.proto",
    "warren/v1/secret.proto",
    "warren/v1/service.proto",
    "warren/v1/session.proto",
    "warren/v1/stats.proto",
    "warren/v1/telemetry.proto",
    "warren/v1/volume.proto",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=warren");
    let descriptors = PathBuf::from(env::var("OUT_DIR")?).join("descriptors.bin");
    let mut config = tonic_prost_build::Config::new();
    config.enable_type_names();
    tonic_prost_build::configure()
        .file_descriptor_set_path(&descriptors)
        .compile_well_known_types(true)
        .extern_path(".google.protobuf", "::pbjson_types")
        .btree_map(".")
        .compile_with_config(config, &FILES, &["."])?;
    pbjson_build::Builder::new()
        .register_descriptors(&fs::read(descriptors)?)?
        .btree_map(["."])
        .build(&[".warren.v1"])?;
    Ok(())
}
