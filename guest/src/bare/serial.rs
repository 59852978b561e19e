//! The serial port, one line at a time.

use core::fmt::{self, Write};
use core::hint;
use core::sync::atomic::{AtomicBool, Ordering};

use x86_64::instructions::port::{Port, PortWriteOnly};

const DATA: u16 = 0x3f8;
const FIFO_CONTROL: u16 = DATA + 2;
const LINE_STATUS: u16 = DATA + 5;

const FIFO_ENABLE: u8 = 1;
const TRANSMITTER_EMPTY: u8 = 1 << 5;

/// Bytes that may follow an empty transmitter without asking again.
const FIFO_SIZE: usize = 16;

/// How often the line status is read before a byte is written all the same, and how long another CPU's line is waited for.
const PATIENCE: u32 = 1 << 20;

/// Lines are cut here; the longest command-line error fits.
const LINE_SIZE: usize = 512;

static PRINTING: AtomicBool = AtomicBool::new(false);

/// Prints a line. Lines of several CPUs do not mix, unless one of them failed in the middle of its line.
pub(super) fn println(words: fmt::Arguments<'_>) {
    let mut line = Line {
        bytes: [0; LINE_SIZE],
        length: 0,
    };
    // A line does not fail, it is cut.
    let _ = line.write_fmt(words);
    lock();
    write(&line.bytes[..line.length]);
    write(b"\n");
    PRINTING.store(false, Ordering::Release);
}

fn lock() {
    for _ in 0..PATIENCE {
        if PRINTING
            .compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed)
            .is_ok()
        {
            return;
        }
        hint::spin_loop();
    }
}

fn write(bytes: &[u8]) {
    let mut data = PortWriteOnly::<u8>::new(DATA);
    let mut fifo_control = PortWriteOnly::<u8>::new(FIFO_CONTROL);
    let mut line_status = Port::<u8>::new(LINE_STATUS);
    // SAFETY: the ports of a 16550; they have no effect on memory.
    unsafe {
        fifo_control.write(FIFO_ENABLE);
        for chunk in bytes.chunks(FIFO_SIZE) {
            for _ in 0..PATIENCE {
                if line_status.read() & TRANSMITTER_EMPTY != 0 {
                    break;
                }
                hint::spin_loop();
            }
            for &byte in chunk {
                data.write(byte);
            }
        }
    }
}

/// A line in the making. What came with the command line is made printable.
struct Line {
    bytes: [u8; LINE_SIZE],
    length: usize,
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for &byte in text.as_bytes() {
            let Some(place) = self.bytes.get_mut(self.length) else {
                return Err(fmt::Error);
            };
            *place = if byte == b' ' || byte.is_ascii_graphic() {
                byte
            } else {
                b'?'
            };
            self.length += 1;
        }
        Ok(())
    }
}
