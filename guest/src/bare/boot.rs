//! Reads what the PVH loader left in memory.

use core::{mem, slice, str};

use guest::command_line::MAX_LENGTH;
use guest::memory_map::{MemoryMap, TooManyRanges};
use guest::start_info::{MAGIC, MEMORY_TYPE_RAM, MemoryMapEntry, Module, StartInfo};

use super::{Refusal, entry, refuse};

/// The memory that is mapped before a workload maps more.
const MAPPED: u64 = 1 << 30;

/// What the loader said. It stays where the loader put it.
pub(super) struct Boot {
    start_info_address: u64,
    start_info: &'static StartInfo,
    memory_map: &'static [MemoryMapEntry],
    modules: &'static [Module],
    pub(super) command_line: &'static str,
}

impl Boot {
    /// Reads the tables that `start_info` leads to.
    pub(super) fn read(start_info_address: u64) -> Result<Self, Refusal> {
        let start_info = &table::<StartInfo>("start_info", start_info_address, 1)?[0];
        if start_info.magic != MAGIC {
            let magic = start_info.magic;
            return Err(refuse!(Machine, "error=bad_start_info magic={magic:#x}"));
        }
        if start_info.version < 1 || start_info.memory_map_entries == 0 {
            return Err(refuse!(Machine, "error=no_memory_map"));
        }
        Ok(Self {
            start_info_address,
            start_info,
            memory_map: table("memory_map", start_info.memory_map, start_info.memory_map_entries)?,
            modules: table("modules", start_info.module_list, start_info.module_count)?,
            command_line: command_line(start_info.command_line)?,
        })
    }

    /// Bytes of RAM in the memory map.
    pub(super) fn ram_bytes(&self) -> u64 {
        let ram = self.memory_map.iter().filter(|entry| is_ram(entry));
        ram.map(|entry| entry.size).sum()
    }

    /// RAM, less everything that somebody has laid there: the guest itself, the modules, and these tables.
    pub(super) fn memory_map(&self) -> Result<MemoryMap, Refusal> {
        self.usable()
            .map_err(|TooManyRanges| refuse!(Machine, "error=too_many_memory_ranges"))
    }

    fn usable(&self) -> Result<MemoryMap, TooManyRanges> {
        let mut map = MemoryMap::new();
        for entry in self.memory_map.iter().filter(|entry| is_ram(entry)) {
            map.add(entry.address, entry.size)?;
        }
        for entry in self.memory_map.iter().filter(|entry| !is_ram(entry)) {
            map.remove(entry.address, entry.size)?;
        }
        for module in self.modules {
            map.remove(module.address, module.size)?;
        }
        let (own_start, own_size) = entry::own_memory();
        for (address, size) in [
            (own_start, own_size),
            (self.start_info_address, mem::size_of::<StartInfo>() as u64),
            (
                self.start_info.memory_map,
                mem::size_of_val(self.memory_map) as u64,
            ),
            (self.start_info.module_list, mem::size_of_val(self.modules) as u64),
            (self.start_info.command_line, self.command_line.len() as u64 + 1),
        ] {
            if address != 0 {
                map.remove(address, size)?;
            }
        }
        Ok(map)
    }
}

fn is_ram(entry: &MemoryMapEntry) -> bool {
    entry.memory_type == MEMORY_TYPE_RAM
}

/// The `count` entries of a table at a guest-physical address, which must be mapped.
fn table<T>(name: &str, address: u64, count: u32) -> Result<&'static [T], Refusal> {
    if count == 0 {
        return Ok(&[]);
    }
    let size = u64::from(count) * mem::size_of::<T>() as u64;
    let is_mapped = address != 0 && address <= MAPPED && size <= MAPPED - address;
    if !is_mapped || !address.is_multiple_of(mem::align_of::<T>() as u64) {
        return Err(refuse!(
            Machine,
            "error=bad_address table={name} address={address:#x} size={size:#x}"
        ));
    }
    // SAFETY: the address is mapped, aligned and not null; every T of this module is integers only; and nothing writes there,
    // because the pages of these tables are taken out of the memory map.
    Ok(unsafe { slice::from_raw_parts(address as *const T, count as usize) })
}

/// The text up to the zero byte.
fn command_line(address: u64) -> Result<&'static str, Refusal> {
    if address == 0 {
        return Ok("");
    }
    let room = MAPPED.saturating_sub(address).min(MAX_LENGTH as u64) as u32;
    let mut length = 0;
    // Byte by byte, because the page behind the text may be absent and is none of ours.
    while length < room {
        if table::<u8>("command_line", address + u64::from(length), 1)?[0] == 0 {
            let bytes = table("command_line", address, length)?;
            return str::from_utf8(bytes).map_err(|_| refuse!(CommandLine, "error=command_line_is_not_text"));
        }
        length += 1;
    }
    Err(refuse!(
        CommandLine,
        "error=command_line_too_long limit={MAX_LENGTH}"
    ))
}
