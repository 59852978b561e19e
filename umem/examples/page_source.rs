//! Memory whose page i is full of i.

use umem::device::{Device, DeviceError, DeviceOptions, Serving};
use umem::units::{PAGE_SIZE, PageIndex};

/// The page source.
fn serve(device: &Device) -> Result<(), DeviceError> {
    let mut pages = [PageIndex(0); 64];
    loop {
        let count = device.read(&mut pages)?;
        if count == 0 {
            return Ok(());
        }
        for page in &pages[..count] {
            device.server()?.fill(*page, &[page.0 as u8; PAGE_SIZE])?;
        }
        device.write(&pages[..count])?;
    }
}

fn main() -> Result<(), DeviceError> {
    let device = Device::create(DeviceOptions {
        size: 16 * PAGE_SIZE as u64,
        max_requests: 512,
        serving: Serving::Copied,
    })?;
    let memory = device.map_all()?;
    std::thread::scope(|scope| {
        let server = scope.spawn(|| serve(&device));
        // SAFETY: mapped for as long as `memory`, and written by nobody once it is there.
        let bytes = unsafe { std::slice::from_raw_parts(memory.start(), memory.length()) };
        let first: Vec<u8> = bytes.iter().step_by(PAGE_SIZE).copied().collect();
        println!("{first:?}");
        // The end of the device, and of the server's loop, as soon as the write that brought the last page has returned.
        while let Err(DeviceError::Incomplete) = device.make_anonymous() {
            std::thread::yield_now();
        }
        server.join().expect("the server")
    })
}
