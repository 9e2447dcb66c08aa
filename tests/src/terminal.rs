use std::{
    fs::File,
    io::{Read as _, Write as _},
    process::{Child, Command, ExitStatus},
    sync::mpsc::{Receiver, RecvTimeoutError, channel},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    fs::{Mode, OFlags, open},
    process::{Pid, Signal, kill_process},
    pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt},
    termios::{Winsize, tcsetwinsize},
};

use crate::until;

/// How long what is expected on a terminal may take to be there.
const PATIENCE: Duration = Duration::from_secs(20);

/// A terminal with a command in it.
#[derive(Debug)]
pub struct Terminal {
    keyboard: File,
    child: Child,
    output: Receiver<Vec<u8>>,
    shown: String,
}

impl Terminal {
    /// Starts a command in a terminal of this size.
    #[must_use]
    pub fn start(command: &mut Command, rows: u16, columns: u16) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).expect("a terminal");
        grantpt(&master).expect("a terminal");
        unlockpt(&master).expect("a terminal");
        let name = ptsname(&master, Vec::new()).expect("a name");
        let slave =
            File::from(open(name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty()).expect("a terminal"));
        let keyboard = File::from(master);
        tcsetwinsize(&keyboard, size(rows, columns)).expect("a terminal");
        let child = command
            .stdin(slave.try_clone().expect("a terminal"))
            .stdout(slave.try_clone().expect("a terminal"))
            .stderr(slave)
            .spawn()
            .expect("the command can be run");
        // What holds the other side open is not to outlive the command.
        command
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null());
        let mut screen = keyboard.try_clone().expect("a terminal");
        let (sender, output) = channel();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(read @ 1..) = screen.read(&mut buffer) {
                if sender.send(buffer[..read].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self { keyboard, child, output, shown: String::new() }
    }

    /// Types.
    pub fn type_in(&mut self, text: &str) {
        self.keyboard.write_all(text.as_bytes()).expect("a terminal");
    }

    /// Gives it another size, as a window that is dragged does.
    pub fn resize(&self, rows: u16, columns: u16) {
        tcsetwinsize(&self.keyboard, size(rows, columns)).expect("a terminal");
        // It is not the command's controlling terminal: the kernel does not say it by itself.
        kill_process(Pid::from_child(&self.child), Signal::WINCH).expect("it runs");
    }

    /// Waits until `text` was shown, and returns everything up to it that was not asked for before.
    pub fn until(&mut self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(at) = self.shown.find(text) {
                return self.shown.drain(..at + text.len()).collect();
            }
            match self.output.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(bytes) => self.shown.push_str(&String::from_utf8_lossy(&bytes)),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    panic!("{text:?} is not shown: {:?}", self.shown)
                }
            }
        }
    }

    /// Waits for the command's end.
    #[must_use]
    pub fn ended(&mut self) -> ExitStatus {
        until("the command in the terminal ends", || self.child.try_wait().expect("a child"))
    }

    /// Kills the command.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.kill();
    }
}

fn size(rows: u16, columns: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}
