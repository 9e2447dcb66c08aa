//! The first program of a container that has secrets in its environment. It is given a file of `NAME=value` entries, each ended by a
//! zero byte, and a command: it becomes that command with these variables. So their values are in no spec, and on no disk.
//!
//! Linked statically, for whatever image it is mounted in. Exit codes as a shell's: 127 where there is no such command, 126 where it
//! cannot be run.

use std::{
    env,
    ffi::OsStr,
    fs,
    io::ErrorKind,
    os::unix::{ffi::OsStrExt as _, process::CommandExt as _},
    process::{Command, ExitCode},
};

fn main() -> ExitCode {
    let mut arguments = env::args_os().skip(1);
    let (Some(file), Some(program)) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: env FILE COMMAND [ARGUMENT]...");
        return ExitCode::from(126);
    };
    let mut command = Command::new(&program);
    command.args(arguments);
    match fs::read(&file) {
        Ok(entries) => {
            for entry in entries.split(|byte| *byte == 0) {
                let Some(end) = entry.iter().position(|byte| *byte == b'=') else { continue };
                let (name, value) = (OsStr::from_bytes(&entry[..end]), OsStr::from_bytes(&entry[end + 1..]));
                // What is given to a command that somebody runs in the container counts more.
                if env::var_os(name).is_none() {
                    command.env(name, value);
                }
            }
        }
        // Somebody else than the container's user, who runs a command in it.
        Err(error) if error.kind() == ErrorKind::PermissionDenied => {
            eprintln!("secrets in the environment are left out: they are for the container's own user");
        }
        Err(error) => {
            eprintln!("{}: {error}", file.display());
            return ExitCode::from(126);
        }
    }
    let error = command.exec();
    eprintln!("{}: {error}", program.display());
    ExitCode::from(if error.kind() == ErrorKind::NotFound { 127 } else { 126 })
}
