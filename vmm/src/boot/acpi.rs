//! The ACPI tables, by which a kernel learns how many CPUs there are, where the serial port is, and how to switch the machine off
//! or reset it: ACPI specification 6.5.
//!
//! They describe the machine and not what is in its RAM, so they are no part of an image: they lie in a read-only page outside
//! RAM, made anew for each run. Hardware-reduced ACPI (4.1) needs no power management timer, no SCI and no SMI.

use acpi_tables::{
    Aml,
    aml::{Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, ResourceTemplate, Scope},
    fadt::{FADTBuilder, Flags},
    gas::{AccessSize, AddressSpace, GAS},
    madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic},
    rsdp::Rsdp,
    sdt::Sdt,
    xsdt::XSDT,
};

use crate::address_map::{ACPI_TABLES, BALLOON, IO_APIC, LOCAL_APIC, PAGE_SIZE};
use crate::devices::{BALLOON_IRQ, ResetControl, SERIAL_IRQ, SERIAL_PORTS, SleepControl, VIRTIO_BLOCK_SIZE};

const OEM_ID: [u8; 6] = *b"UMEM  ";
const OEM_TABLE_ID: [u8; 8] = *b"UMEM    ";
const OEM_REVISION: u32 = 1;

/// IAPC_BOOT_ARCH: there is neither VGA nor a real-time clock. (That bit 1 is clear says that there is no keyboard controller.)
const NO_VGA: u16 = 1 << 2;
const NO_REAL_TIME_CLOCK: u16 = 1 << 5;

/// Tables begin at multiples of this.
const ALIGNMENT: usize = 16;
/// The RSDP comes first, padded.
const RSDP_SIZE: usize = size_of::<Rsdp>().next_multiple_of(ALIGNMENT);

/// The page at [`ACPI_TABLES`] of a machine with this many CPUs, at most 255, and perhaps a balloon. It begins with the RSDP.
pub(super) fn tables(cpus: u32, balloon: bool) -> [u8; PAGE_SIZE as usize] {
    let mut page = [0; PAGE_SIZE as usize];
    let mut end = RSDP_SIZE;
    let mut place = |table: &dyn Aml| {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        let start = end;
        page[start..start + bytes.len()].copy_from_slice(&bytes);
        end = (start + bytes.len()).next_multiple_of(ALIGNMENT);
        ACPI_TABLES.0 + start as u64
    };
    let dsdt = place(&dsdt(balloon));
    let fadt = place(&fadt(dsdt));
    let madt = place(&madt(cpus));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    page[..rsdp.len()].copy_from_slice(&rsdp);
    page
}

fn dsdt(balloon: bool) -> Sdt {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let mut aml = Vec::new();
    Scope::new(
        "\\_SB_".into(),
        vec![&Device::new(
            "COM1".into(),
            vec![
                // A 16550A-compatible serial port.
                &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                &Name::new("_UID".into(), &1_u8),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &Interrupt::new(true, true, false, false, SERIAL_IRQ),
                        &IO::new(
                            *SERIAL_PORTS.start(),
                            *SERIAL_PORTS.start(),
                            1,
                            SERIAL_PORTS.len() as u8,
                        ),
                    ]),
                ),
            ],
        )],
    )
    .to_aml_bytes(&mut aml);
    if balloon {
        // Linux' driver for virtio register blocks looks for this identifier.
        Scope::new(
            "\\_SB_".into(),
            vec![&Device::new(
                "VIO0".into(),
                vec![
                    &Name::new("_HID".into(), &"LNRO0005"),
                    &Name::new("_UID".into(), &0_u8),
                    &Name::new(
                        "_CRS".into(),
                        &ResourceTemplate::new(vec![
                            &Memory32Fixed::new(true, BALLOON.0 as u32, VIRTIO_BLOCK_SIZE as u32),
                            &Interrupt::new(true, true, false, false, BALLOON_IRQ),
                        ]),
                    ),
                ],
            )],
        )
        .to_aml_bytes(&mut aml);
    }
    // What to write to the sleep control register to switch the machine off.
    Name::new("_S5_".into(), &Package::new(vec![&SleepControl::OFF])).to_aml_bytes(&mut aml);
    dsdt.append_slice(&aml);
    dsdt
}

fn fadt(dsdt: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup);
    fadt.iapc_boot_arch = (NO_VGA | NO_REAL_TIME_CLOCK).into();
    fadt.reset_reg = port(ResetControl::PORT);
    fadt.reset_value = ResetControl::RESET;
    fadt.sleep_control_reg = port(SleepControl::PORT);
    fadt.sleep_status_reg = port(SleepControl::STATUS_PORT);
    fadt.finalize()
}

fn port(port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into())
}

fn madt(cpus: u32) -> MADT {
    let local_apic = LocalInterruptController::Address(LOCAL_APIC);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, local_apic);
    for id in 0..cpus as u8 {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, IO_APIC, 0));
    madt
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(page: &[u8], address: u64) -> &[u8] {
        let start = (address - ACPI_TABLES.0) as usize;
        let length = u32::from_le_bytes(page[start + 4..start + 8].try_into().unwrap());
        &page[start..start + length as usize]
    }

    fn word(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn every_table_is_found_from_the_rsdp_and_sums_to_zero() {
        for (cpus, balloon) in [(1, false), (2, true), (255, true)] {
            let page = tables(cpus, balloon);
            assert_eq!(&page[..8], b"RSD PTR ");
            assert_eq!(sum(&page[..20]), 0);
            assert_eq!(sum(&page[..36]), 0);
            let xsdt = table(&page, word(&page, 24));
            let (fadt, madt) = (table(&page, word(xsdt, 36)), table(&page, word(xsdt, 44)));
            let dsdt = table(&page, word(fadt, 140));
            for (table, signature) in [(xsdt, b"XSDT"), (fadt, b"FACP"), (madt, b"APIC"), (dsdt, b"DSDT")] {
                assert_eq!(&table[..4], signature);
                assert_eq!(sum(table), 0, "{signature:?}");
            }
            // 8 bytes for each local APIC, and 12 for the I/O APIC.
            assert_eq!(madt.len(), 44 + 8 * cpus as usize + 12);
            let last = &madt[44 + 8 * (cpus as usize - 1)..];
            assert_eq!(last[..5], [0, 8, cpus as u8 - 1, cpus as u8 - 1, 1]);
        }
    }
}
