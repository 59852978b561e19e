//! The console between pipes, with a test in the place of the guest's driver.

// Helpers of tests fail as tests do.
#![allow(clippy::unwrap_used)]

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::OwnedFd,
    thread,
    time::{Duration, Instant},
};

use vmm::{
    devices::{Console, DeviceBus, EventLoop, Stopper},
    ending::Ending,
    kvm::Bus,
};
use vmm_sys_util::eventfd::EventFd;

const DATA: u16 = 0x3f8;
const INTERRUPT_ENABLE: u16 = 0x3f9;
const MODEM_CONTROL: u16 = 0x3fc;
const LINE_STATUS: u16 = 0x3fd;

/// A driver that polls.
struct Guest {
    bus: DeviceBus,
    interrupt: EventFd,
}

impl Guest {
    fn read(&self, port: u16) -> u8 {
        let mut data = [0];
        self.bus.read_port(port, &mut data);
        data[0]
    }

    fn write(&self, port: u16, value: u8) {
        assert_eq!(self.bus.write_port(port, &[value]), None);
    }

    fn has_input(&self) -> bool {
        self.read(LINE_STATUS) & 1 != 0
    }

    /// Reads `length` bytes, with a pause now and then so that the FIFO fills up.
    fn receive(&self, length: usize) -> Vec<u8> {
        let start = Instant::now();
        let mut received = Vec::new();
        while received.len() < length {
            assert!(
                start.elapsed() < Duration::from_secs(20),
                "{} bytes came",
                received.len()
            );
            if self.has_input() {
                received.push(self.read(DATA));
            } else {
                thread::yield_now();
            }
            if received.len() % 1000 == 999 {
                thread::sleep(Duration::from_millis(2));
            }
        }
        received
    }
}

/// Runs `guest` against a console whose input is `input`, and returns what it wrote.
fn with_console(input: Option<OwnedFd>, guest: impl FnOnce(&Guest, &Stopper) + Send) -> Vec<u8> {
    let (mut output, sink) = pipe();
    let interrupt = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    let console = Console::new(input, sink.into(), interrupt.try_clone().unwrap()).unwrap();
    let mut event_loop = EventLoop::new().unwrap();
    let driver = Guest {
        bus: DeviceBus::new(console.serial(), None),
        interrupt,
    };
    event_loop.add(Box::new(console));
    let stopper = event_loop.stopper();
    thread::scope(|scope| {
        scope.spawn(move || {
            guest(&driver, &stopper);
            stopper.end(Ending::PowerOff);
        });
        assert_eq!(event_loop.run().unwrap(), Ending::PowerOff);
    });
    drop(event_loop);
    let mut written = Vec::new();
    output.read_to_end(&mut written).unwrap();
    written
}

fn pipe() -> (File, File) {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    (reader.into(), writer.into())
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|index| (index * 7 % 251) as u8).collect()
}

#[test]
fn no_input_is_lost_however_slow_the_guest_is() {
    let (reader, mut writer) = pipe();
    let sent = pattern(20_000);
    let expected = sent.clone();
    let sender = thread::spawn(move || {
        writer.write_all(&sent).unwrap();
        writer
    });
    with_console(Some(reader.into()), move |guest, _| {
        thread::sleep(Duration::from_millis(30));
        assert_eq!(guest.receive(expected.len()), expected);
    });
    drop(sender.join().unwrap());
}

#[test]
fn input_from_a_file_is_read_to_its_end_and_the_vm_goes_on() {
    let mut file = tempfile::tempfile().unwrap();
    let expected = pattern(5000);
    file.write_all(&expected).unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    with_console(Some(file.into()), move |guest, stopper| {
        assert_eq!(guest.receive(expected.len()), expected);
        thread::sleep(Duration::from_millis(30));
        assert!(!guest.has_input());
        assert_eq!(stopper.ending(), None);
    });
}

#[test]
fn input_that_ends_does_not_end_the_vm() {
    for input in [
        File::open("/dev/null").unwrap(),
        // A pipe whose writer is gone.
        pipe().0,
    ] {
        with_console(Some(input.into()), |guest, stopper| {
            thread::sleep(Duration::from_millis(30));
            assert!(!guest.has_input());
            assert_eq!(stopper.ending(), None);
        });
    }
}

#[test]
fn input_waits_while_the_port_is_in_loop_back_mode() {
    let (reader, mut writer) = pipe();
    with_console(Some(reader.into()), move |guest, _| {
        guest.write(MODEM_CONTROL, 0x10);
        writer.write_all(b"patience").unwrap();
        thread::sleep(Duration::from_millis(30));
        assert!(!guest.has_input());
        guest.write(MODEM_CONTROL, 0x08);
        assert_eq!(guest.receive(8), b"patience");
    });
}

#[test]
fn input_raises_the_interrupt() {
    let (reader, mut writer) = pipe();
    with_console(Some(reader.into()), move |guest, _| {
        guest.write(INTERRUPT_ENABLE, 1);
        writer.write_all(b"x").unwrap();
        assert_eq!(guest.receive(1), b"x");
        assert_eq!(guest.interrupt.read().unwrap(), 1);
    });
}

#[test]
fn a_prompt_appears_without_a_newline() {
    let (mut output, sink) = pipe();
    let console = Console::new(None, sink.into(), EventFd::new(0).unwrap()).unwrap();
    let mut event_loop = EventLoop::new().unwrap();
    let bus = DeviceBus::new(console.serial(), None);
    event_loop.add(Box::new(console));
    let stopper = event_loop.stopper();
    thread::scope(|scope| {
        scope.spawn(move || {
            for round in 0..20 {
                bus.write_port(DATA, b"$");
                let start = Instant::now();
                let mut prompt = [0];
                output.read_exact(&mut prompt).unwrap();
                assert_eq!(&prompt, b"$");
                assert!(start.elapsed() < Duration::from_secs(2), "round {round}");
            }
            stopper.end(Ending::PowerOff);
        });
        event_loop.run().unwrap();
    });
}

#[test]
fn all_output_is_there_at_the_end() {
    let written = with_console(None, |guest, _| {
        for byte in b"first line\nsecond line\nno newline" {
            guest.write(DATA, *byte);
        }
        assert_eq!(guest.bus.write_port(0xf4, &[3]), Some(Ending::GuestExit(3)));
    });
    assert_eq!(written, b"first line\nsecond line\nno newline");
}

#[test]
fn the_platform_can_be_reset_and_has_nothing_elsewhere() {
    with_console(None, |guest, _| {
        assert_eq!(guest.bus.write_port(0x64, &[0xfe]), Some(Ending::Reset));
        assert_eq!(guest.bus.write_port(0xcf9, &[0x06]), Some(Ending::Reset));
        assert_eq!(guest.bus.write_port(0xcf8, &[0, 0x06, 0, 0x80]), None);
        assert_eq!(guest.bus.write_port(0x80, &[0x42]), None);
        let mut wide = [0; 4];
        guest.bus.read_port(0xcfc, &mut wide);
        assert_eq!(wide, [0xff; 4]);
    });
}

#[test]
fn the_first_ending_counts() {
    let mut event_loop = EventLoop::new().unwrap();
    let stopper = event_loop.stopper();
    stopper.end(Ending::GuestExit(1));
    stopper.end(Ending::TripleFault);
    assert_eq!(event_loop.run().unwrap(), Ending::GuestExit(1));
}

#[test]
fn signals_stop_the_vm() {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        let mut event_loop = EventLoop::new().unwrap();
        // SAFETY: the calling thread is alive, and the event loop has blocked the signal in it.
        assert_eq!(unsafe { libc::pthread_kill(libc::pthread_self(), signal) }, 0);
        assert_eq!(event_loop.run().unwrap(), Ending::Stopped);
    }
}

#[test]
fn other_descriptors_are_served() {
    let (reader, mut writer) = pipe();
    let mut event_loop = EventLoop::new().unwrap();
    event_loop.add_descriptor(reader.into(), |fd| {
        let mut byte = [0];
        rustix::io::read(fd, &mut byte).unwrap();
        (byte == *b"!").then_some(Ending::Panic)
    });
    writer.write_all(b"??!").unwrap();
    assert_eq!(event_loop.run().unwrap(), Ending::Panic);
}
