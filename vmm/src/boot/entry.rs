//! How a kernel is entered, in the form in which an image's metadata keeps it.

use firmware::boot_info::{BootInfo, Protocol};
use serde::{Deserialize, Serialize};

/// A storable [`BootInfo`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The state in which the entry is reached.
    pub protocol: EntryProtocol,
    /// Guest-physical address to jump to.
    pub entry: u64,
    /// Handed to the entry in the register that its protocol names.
    pub argument: u64,
    /// CR3 for [`EntryProtocol::LongMode`], else 0.
    #[serde(default)]
    pub page_table_root: u64,
}

/// A storable [`Protocol`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EntryProtocol {
    /// 32-bit protected mode, paging off.
    Pvh,
    /// 64-bit mode, paging on.
    LongMode,
}

impl From<BootInfo> for Entry {
    fn from(boot: BootInfo) -> Self {
        Self {
            protocol: match boot.protocol {
                Protocol::Pvh => EntryProtocol::Pvh,
                Protocol::LongMode => EntryProtocol::LongMode,
            },
            entry: boot.entry,
            argument: boot.argument,
            page_table_root: boot.page_table_root,
        }
    }
}

impl From<Entry> for BootInfo {
    fn from(entry: Entry) -> Self {
        Self {
            protocol: match entry.protocol {
                EntryProtocol::Pvh => Protocol::Pvh,
                EntryProtocol::LongMode => Protocol::LongMode,
            },
            entry: entry.entry,
            argument: entry.argument,
            page_table_root: entry.page_table_root,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn survives_being_stored() {
        for protocol in [Protocol::Pvh, Protocol::LongMode] {
            let boot = BootInfo {
                protocol,
                entry: 0x10_0000,
                argument: 0xe_0000,
                page_table_root: 0x9000,
            };
            let stored = serde_json::to_string(&Entry::from(boot)).unwrap();
            let entry: Entry = serde_json::from_str(&stored).unwrap();
            assert_eq!(BootInfo::from(entry), boot);
        }
    }

    #[test]
    fn is_readable_in_the_metadata() {
        let entry: Entry =
            serde_json::from_str(r#"{"protocol":"pvh","entry":1048576,"argument":917504}"#).unwrap();
        assert_eq!(entry.protocol, EntryProtocol::Pvh);
        assert_eq!(entry.page_table_root, 0);
    }
}
