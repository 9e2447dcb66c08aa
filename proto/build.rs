//! Generates the messages, their canonical JSON form, the gRPC clients and servers, and the table of who may call what.

use std::{env, error::Error, fmt::Write as _, fs, path::PathBuf};

use prost::Message;

/// Where the files are.
const DIRECTORY: &str = "warren/v1";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=warren");
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let descriptors = out.join("descriptors.bin");
    let files = fs::read_dir(DIRECTORY)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>, Box<dyn Error>>>()?;
    let mut files: Vec<_> = files.into_iter().filter(|path| path.extension().is_some_and(|is| is == "proto")).collect();
    files.sort();
    let mut config = tonic_prost_build::Config::new();
    config.enable_type_names();
    tonic_prost_build::configure()
        .file_descriptor_set_path(&descriptors)
        .compile_well_known_types(true)
        .extern_path(".google.protobuf", "::pbjson_types")
        .btree_map(".")
        .compile_with_config(config, &files, &[PathBuf::from(".")])?;
    let descriptors = fs::read(descriptors)?;
    fs::write(out.join("methods.rs"), methods(&descriptors)?)?;
    pbjson_build::Builder::new().register_descriptors(&descriptors)?.btree_map(["."]).build(&[".warren.v1"])?;
    Ok(())
}

/// The array of all methods, in Rust, in the order of their paths.
fn methods(descriptors: &[u8]) -> Result<String, Box<dyn Error>> {
    let mut methods = Vec::new();
    for file in Files::decode(descriptors)?.files {
        for service in file.services {
            for method in service.methods {
                let path = format!("/{}.{}/{}", file.package, service.name, method.name);
                let options = method.options.unwrap_or_default();
                let Some(access) =
                    options.access.and_then(|access| ACCESS.get(usize::try_from(access).ok()?)?.as_ref())
                else {
                    return Err(format!("{path} does not say who may call it: `option (access) = ACCESS_...;`").into());
                };
                methods.push((path, *access, options.local));
            }
        }
    }
    methods.sort_unstable();
    let mut text = "[".to_owned();
    for (path, access, local) in methods {
        writeln!(text, "Method {{ path: {path:?}, access: v1::Access::{access}, local: {local} }},")?;
    }
    Ok(text + "]")
}

/// Values of the enum `Access`, as Rust names them.
const ACCESS: [Option<&str>; 6] =
    [None, Some("Anyone"), Some("Members"), Some("Managers"), Some("Workers"), Some("Operators")];

// Of `google.protobuf.FileDescriptorSet` what is needed here: prost's own leaves out options of others.

#[derive(Message)]
struct Files {
    #[prost(message, repeated, tag = "1")]
    files: Vec<File>,
}

#[derive(Message)]
struct File {
    #[prost(string, tag = "2")]
    package: String,
    #[prost(message, repeated, tag = "6")]
    services: Vec<Service>,
}

#[derive(Message)]
struct Service {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, repeated, tag = "2")]
    methods: Vec<Method>,
}

#[derive(Message)]
struct Method {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, optional, tag = "4")]
    options: Option<Options>,
}

#[derive(Message)]
struct Options {
    #[prost(int32, optional, tag = "50900")]
    access: Option<i32>,
    #[prost(bool, tag = "50901")]
    local: bool,
}
