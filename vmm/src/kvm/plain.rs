//! Structures of KVM's interface, and bytes, as text: base64 without the zero bytes at the end.
//!
//! Most of what KVM saves is zero. What is left out is known by the structure's size, and a text that is longer than that is
//! refused, so that nothing larger than the structure is ever made of it.

use base64::Engine;
use base64::engine::general_purpose::STANDARD_NO_PAD as BASE64;
use kvm_bindings::{
    kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_pit_state2, kvm_regs, kvm_sregs2,
    kvm_vcpu_events, kvm_xcrs,
};
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A structure of KVM's interface.
///
/// # Safety
///
/// Any bytes are a value of it, and it has no byte that is not part of a field.
pub(super) unsafe trait Plain: Copy {}

// SAFETY: integers, arrays and structures of integers, with explicit padding (Linux `arch/x86/include/uapi/asm/kvm.h`).
unsafe impl Plain for kvm_regs {}
// SAFETY: as above.
unsafe impl Plain for kvm_sregs2 {}
// SAFETY: as above.
unsafe impl Plain for kvm_debugregs {}
// SAFETY: as above.
unsafe impl Plain for kvm_lapic_state {}
// SAFETY: as above.
unsafe impl Plain for kvm_vcpu_events {}
// SAFETY: as above.
unsafe impl Plain for kvm_xcrs {}
// SAFETY: as above.
unsafe impl Plain for kvm_pit_state2 {}
// SAFETY: as above.
unsafe impl Plain for kvm_cpuid_entry2 {}
// SAFETY: as above; the union is as long as its longest member, and all of it was zero before KVM wrote to it.
unsafe impl Plain for kvm_irqchip {}

/// The bytes of a structure.
fn bytes_of<T: Plain>(value: &T) -> &[u8] {
    // SAFETY: all bytes of a `Plain` are initialised, and the borrow is as long as that of `value`.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

pub(super) fn serialize<T: Plain, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
    encode(bytes_of(value)).serialize(serializer)
}

pub(super) fn deserialize<'de, T: Plain, D: Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
    let bytes = decode(deserializer)?;
    if bytes.len() > size_of::<T>() {
        return Err(D::Error::custom(format_args!(
            "{} bytes where there are {}",
            bytes.len(),
            size_of::<T>()
        )));
    }
    let mut value = std::mem::MaybeUninit::<T>::zeroed();
    // SAFETY: `bytes` is not longer than the value; any bytes, the zeros behind them too, are one.
    Ok(unsafe {
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), value.as_mut_ptr().cast(), bytes.len());
        value.assume_init()
    })
}

fn encode(bytes: &[u8]) -> String {
    let used = bytes
        .iter()
        .rposition(|byte| *byte != 0)
        .map_or(0, |last| last + 1);
    BASE64.encode(&bytes[..used])
}

fn decode<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    let text = String::deserialize(deserializer)?;
    BASE64.decode(text).map_err(D::Error::custom)
}

/// Bytes of which there are as many as whoever reads them wants: behind those that are here there are zeros.
#[derive(Clone, PartialEq, Eq)]
pub struct Blob(Vec<u8>);

impl Blob {
    /// These bytes.
    pub fn new(bytes: &[u8]) -> Self {
        let used = bytes
            .iter()
            .rposition(|byte| *byte != 0)
            .map_or(0, |last| last + 1);
        Self(bytes[..used].to_vec())
    }

    /// The bytes up to the last that is not zero.
    pub fn used(&self) -> &[u8] {
        &self.0
    }
}

impl std::fmt::Debug for Blob {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Blob({} bytes)", self.0.len())
    }
}

impl Serialize for Blob {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        encode(&self.0).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Blob {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        decode(deserializer).map(|bytes| Self::new(&bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Two {
        #[serde(with = "super")]
        regs: kvm_regs,
        blob: Blob,
    }

    #[test]
    fn a_structure_survives_being_text_and_is_short() {
        let two = Two {
            regs: kvm_regs {
                rax: 0x1122_3344_5566_7788,
                rflags: 0,
                ..Default::default()
            },
            blob: Blob::new(&[1, 0, 2, 0, 0]),
        };
        let text = serde_json::to_string(&two).unwrap();
        assert_eq!(text, r#"{"regs":"iHdmVUQzIhE","blob":"AQAC"}"#);
        assert_eq!(serde_json::from_str::<Two>(&text).unwrap(), two);
    }

    #[test]
    fn what_is_longer_than_the_structure_is_refused() {
        let long = BASE64.encode([1; size_of::<kvm_regs>() + 1]);
        let text = format!(r#"{{"regs":"{long}","blob":""}}"#);
        let error = serde_json::from_str::<Two>(&text).unwrap_err();
        assert!(
            error.to_string().contains("145 bytes where there are 144"),
            "{error}"
        );
        assert!(serde_json::from_str::<Two>(r#"{"regs":"!","blob":""}"#).is_err());
    }
}
