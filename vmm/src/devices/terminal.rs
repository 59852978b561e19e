//! The terminal in the guest's hands.

use std::os::fd::OwnedFd;

use rustix::{
    io::Errno,
    termios::{
        InputModes, LocalModes, OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcgetpgrp, tcsetattr,
    },
};
use tracing::warn;

/// `_POSIX_VDISABLE`: no key has this meaning.
const DISABLED: u8 = 0;

/// Keys go to the guest as they are typed, until this is restored or dropped.
///
/// Two things stay with the host: the keys that end a program, so that Ctrl-C stops the VM, and the processing of output, so
/// that messages of this program do not run down the screen like stairs.
#[derive(Debug)]
pub(super) struct RawMode {
    terminal: OwnedFd,
    saved: Option<Termios>,
}

impl RawMode {
    /// Switches `terminal` over.
    pub(super) fn enter(terminal: OwnedFd) -> Result<Self, Errno> {
        let saved = tcgetattr(&terminal)?;
        let mut raw = saved.clone();
        raw.local_modes
            .remove(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ECHONL | LocalModes::IEXTEN);
        raw.input_modes.remove(
            InputModes::ICRNL
                | InputModes::INLCR
                | InputModes::IGNCR
                | InputModes::IXON
                | InputModes::ISTRIP
                | InputModes::BRKINT
                | InputModes::PARMRK,
        );
        // Ctrl-Z is for the guest's shell. This program could not give the terminal back before it is stopped.
        raw.special_codes[SpecialCodeIndex::VSUSP] = DISABLED;
        tcsetattr(&terminal, OptionalActions::Now, &raw)?;
        Ok(Self {
            terminal,
            saved: Some(saved),
        })
    }

    /// Gives the terminal back as it was. The second time there is nothing to do, nor when another job has it by now: its
    /// modes are that job's then, and changing them would stop this process.
    pub(super) fn restore(&mut self) {
        if let Some(saved) = self.saved.take()
            && !is_of_another_job(&self.terminal)
            && let Err(error) = tcsetattr(&self.terminal, OptionalActions::Now, &saved)
        {
            warn!(%error, "cannot restore the terminal; `reset` does");
        }
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        self.restore();
    }
}

/// Whether this process runs in the background of this terminal, where reading from it and changing its modes would stop the
/// process. A terminal that does not control this process does not do that.
pub(super) fn is_of_another_job(terminal: &OwnedFd) -> bool {
    tcgetpgrp(terminal).is_ok_and(|group| group != rustix::process::getpgrp())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{os::fd::FromRawFd, ptr::null_mut};

    fn pseudo_terminal() -> (OwnedFd, OwnedFd) {
        let (mut controller, mut terminal) = (-1, -1);
        // SAFETY: the first two are out parameters, the others may be null.
        let result = unsafe {
            libc::openpty(
                &raw mut controller,
                &raw mut terminal,
                null_mut(),
                null_mut(),
                null_mut(),
            )
        };
        assert_eq!(result, 0);
        // SAFETY: new descriptors that nobody else owns.
        unsafe { (OwnedFd::from_raw_fd(controller), OwnedFd::from_raw_fd(terminal)) }
    }

    fn modes(terminal: &OwnedFd) -> (LocalModes, InputModes) {
        let modes = tcgetattr(terminal).unwrap();
        (modes.local_modes, modes.input_modes)
    }

    #[test]
    fn keys_go_to_the_guest_and_signals_stay() {
        let (_controller, terminal) = pseudo_terminal();
        let before = modes(&terminal);
        let raw = RawMode::enter(terminal.try_clone().unwrap()).unwrap();
        let (local, input) = modes(&terminal);
        assert!(!local.intersects(LocalModes::ICANON | LocalModes::ECHO));
        assert!(local.contains(LocalModes::ISIG));
        assert!(!input.contains(InputModes::ICRNL));
        drop(raw);
        assert_eq!(modes(&terminal), before);
    }

    #[test]
    fn is_restored_once() {
        let (_controller, terminal) = pseudo_terminal();
        let before = modes(&terminal);
        let mut first = RawMode::enter(terminal.try_clone().unwrap()).unwrap();
        first.restore();
        assert_eq!(modes(&terminal), before);
        let _second = RawMode::enter(terminal.try_clone().unwrap()).unwrap();
        let raw = modes(&terminal);
        first.restore();
        drop(first);
        assert_eq!(modes(&terminal), raw);
    }

    #[test]
    fn a_pipe_is_no_terminal() {
        let (reader, _writer) = rustix::pipe::pipe().unwrap();
        assert!(RawMode::enter(reader).is_err());
    }
}
