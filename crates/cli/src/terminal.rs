//! The terminal that this command runs in.

use std::io::{self, Read as _, Write as _};

use rustix::termios::{LocalModes, OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};
use warren_proto::v1;

use crate::output::printable;

/// The terminal's size; `None` where there is none.
pub(crate) fn size() -> Option<v1::TerminalSize> {
    let size = tcgetwinsize(io::stdout()).or_else(|_| tcgetwinsize(io::stdin())).ok()?;
    Some(v1::TerminalSize { rows: size.ws_row.into(), columns: size.ws_col.into() })
}

pub(crate) fn is_input() -> bool {
    isatty(io::stdin())
}

pub(crate) fn is_output() -> bool {
    isatty(io::stdout())
}

/// A terminal that passes every key on as it is, until this is dropped.
#[derive(Debug)]
pub(crate) struct Raw(Termios);

impl Raw {
    pub(crate) fn enter() -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Flush, &raw)?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // Drain: what was written last is to be seen as it was meant.
        let _ = tcsetattr(io::stdin(), OptionalActions::Drain, &self.0);
    }
}

/// A terminal that shows one picture after the other, until this is dropped.
#[derive(Debug)]
pub(crate) struct Screen {
    before: Option<Termios>,
}

impl Screen {
    pub(crate) fn enter() -> io::Result<Self> {
        let before = if is_input() { Some(tcgetattr(io::stdin())?) } else { None };
        if let Some(mut keys) = before.clone() {
            keys.local_modes.remove(LocalModes::ICANON | LocalModes::ECHO);
            tcsetattr(io::stdin(), OptionalActions::Now, &keys)?;
        }
        // The other screen, without a cursor.
        io::stdout().write_all(b"\x1b[?1049h\x1b[?25l")?;
        Ok(Self { before })
    }

    /// Shows these lines, as far as there is room.
    pub(crate) fn show(&self, lines: &[String]) -> io::Result<()> {
        let size = size().unwrap_or_default();
        let room = |size: u32| if size == 0 { usize::MAX } else { size as usize };
        let mut picture = String::from("\x1b[H");
        for (number, line) in lines.iter().take(room(size.rows)).enumerate() {
            if number > 0 {
                picture.push_str("\r\n");
            }
            picture.extend(printable(line).chars().take(room(size.columns)));
            // To the line's end.
            picture.push_str("\x1b[K");
        }
        // To the screen's end.
        picture.push_str("\x1b[J");
        let mut stdout = io::stdout().lock();
        stdout.write_all(picture.as_bytes())?;
        stdout.flush()
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = io::stdout().write_all(b"\x1b[?25h\x1b[?1049l");
        let _ = io::stdout().flush();
        if let Some(before) = &self.before {
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, before);
        }
    }
}

/// Resolves when somebody presses q.
pub(crate) async fn quit() {
    let (sender, pressed) = tokio::sync::oneshot::channel();
    // Nobody waits for it: it may be in a read that never ends.
    std::thread::spawn(move || {
        let mut key = [0];
        while matches!(io::stdin().lock().read(&mut key), Ok(1)) {
            if key[0] == b'q' {
                let _ = sender.send(());
                return;
            }
        }
        // There are no keys to be pressed.
        std::mem::forget(sender);
    });
    let _ = pressed.await;
}
