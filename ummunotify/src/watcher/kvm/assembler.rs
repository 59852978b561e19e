//! BPF instructions with labels, as many as the program needs.
//!
//! Source: the kernel's `Documentation/bpf/standardization/instruction-set.rst`.

use std::os::fd::RawFd;

/// A register. `R10` is the frame.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Reg(u8);

pub(crate) const R0: Reg = Reg(0);
pub(crate) const R1: Reg = Reg(1);
pub(crate) const R2: Reg = Reg(2);
pub(crate) const R3: Reg = Reg(3);
pub(crate) const R6: Reg = Reg(6);
pub(crate) const R7: Reg = Reg(7);
pub(crate) const R8: Reg = Reg(8);
pub(crate) const R9: Reg = Reg(9);
pub(crate) const R10: Reg = Reg(10);

/// Operations of two operands, of which the first takes the result.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Alu {
    Add = 0x00,
    Sub = 0x10,
    And = 0x50,
    ShiftLeft = 0x60,
    ShiftRight = 0x70,
    Move = 0xb0,
    ShiftRightSigned = 0xc0,
}

/// Conditions, unsigned.
#[derive(Clone, Copy, Debug)]
pub(crate) enum If {
    Equal = 0x10,
    Greater = 0x20,
    AtLeast = 0x30,
    Less = 0xa0,
    AtMost = 0xb0,
}

/// Widths of memory accesses.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Width {
    Word32 = 0x00,
    Word64 = 0x18,
}

/// Functions of the kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Helper {
    MapLookup = 1,
    RingReserve = 131,
    RingSubmit = 132,
}

/// A place to jump to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Label(usize);

/// The program so far.
#[derive(Debug, Default)]
pub(crate) struct Assembler {
    instructions: Vec<Instruction>,
    /// Where each label is.
    labels: Vec<usize>,
    /// Jumps to labels, by their places.
    jumps: Vec<(usize, Label)>,
}

/// As the kernel takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

const LOAD: u8 = 0x61;
const STORE: u8 = 0x63;
const STORE_IMMEDIATE: u8 = 0x62;
const ATOMIC_ADD_64: u8 = 0xdb;
const LOAD_WIDE: u8 = 0x18;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
const ALU_64: u8 = 0x07;
const ALU_32: u8 = 0x04;
const JUMP: u8 = 0x05;
const FROM_REGISTER: u8 = 0x08;

/// In the register field of a wide load: the immediate is the descriptor of a map, or of one whose value is meant.
const MAP: Reg = Reg(1);
const MAP_VALUE: Reg = Reg(2);

impl Assembler {
    fn push(&mut self, code: u8, destination: Reg, source: Reg, offset: i16, immediate: i32) {
        self.instructions.push(Instruction {
            code,
            registers: destination.0 | source.0 << 4,
            offset,
            immediate,
        });
    }

    pub(crate) fn alu(&mut self, operation: Alu, destination: Reg, source: Reg) {
        self.push(
            operation as u8 | ALU_64 | FROM_REGISTER,
            destination,
            source,
            0,
            0,
        );
    }

    pub(crate) fn alu_with(&mut self, operation: Alu, destination: Reg, value: i32) {
        self.push(operation as u8 | ALU_64, destination, R0, 0, value);
    }

    /// In 32 bits; the upper half becomes 0.
    pub(crate) fn alu_32(&mut self, operation: Alu, destination: Reg, source: Reg) {
        self.push(
            operation as u8 | ALU_32 | FROM_REGISTER,
            destination,
            source,
            0,
            0,
        );
    }

    pub(crate) fn load(&mut self, width: Width, destination: Reg, base: Reg, offset: i16) {
        self.push(LOAD | width as u8, destination, base, offset, 0);
    }

    pub(crate) fn store(&mut self, width: Width, base: Reg, offset: i16, source: Reg) {
        self.push(STORE | width as u8, base, source, offset, 0);
    }

    pub(crate) fn store_value(&mut self, width: Width, base: Reg, offset: i16, value: i32) {
        self.push(STORE_IMMEDIATE | width as u8, base, R0, offset, value);
    }

    pub(crate) fn atomic_add(&mut self, base: Reg, offset: i16, source: Reg) {
        self.push(ATOMIC_ADD_64, base, source, offset, 0);
    }

    pub(crate) fn load_constant(&mut self, destination: Reg, value: u64) {
        self.push(LOAD_WIDE, destination, R0, 0, value as i32);
        self.push(0, R0, R0, 0, (value >> 32) as i32);
    }

    pub(crate) fn load_map(&mut self, destination: Reg, map: RawFd) {
        self.push(LOAD_WIDE, destination, MAP, 0, map);
        self.push(0, R0, R0, 0, 0);
    }

    /// The address of the value of a map that has only one.
    pub(crate) fn load_map_value(&mut self, destination: Reg, map: RawFd) {
        self.push(LOAD_WIDE, destination, MAP_VALUE, 0, map);
        self.push(0, R0, R0, 0, 0);
    }

    pub(crate) fn call(&mut self, helper: Helper) {
        self.push(CALL, R0, R0, 0, helper as i32);
    }

    pub(crate) fn exit(&mut self) {
        self.push(EXIT, R0, R0, 0, 0);
    }

    /// A label, to be placed.
    pub(crate) fn label(&mut self) -> Label {
        self.labels.push(usize::MAX);
        Label(self.labels.len() - 1)
    }

    /// A label is here.
    pub(crate) fn place(&mut self, label: Label) {
        self.labels[label.0] = self.instructions.len();
    }

    pub(crate) fn jump_if(&mut self, first: Reg, condition: If, second: Reg, to: Label) {
        self.jumps.push((self.instructions.len(), to));
        self.push(condition as u8 | JUMP | FROM_REGISTER, first, second, 0, 0);
    }

    pub(crate) fn jump_if_value(&mut self, first: Reg, condition: If, value: i32, to: Label) {
        self.jumps.push((self.instructions.len(), to));
        self.push(condition as u8 | JUMP, first, R0, 0, value);
    }

    /// The program.
    pub(crate) fn finish(mut self) -> Vec<Instruction> {
        for (at, label) in self.jumps {
            self.instructions[at].offset = (self.labels[label.0] - at - 1) as i16;
        }
        self.instructions
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `llvm-mc -triple bpfel` encodes the same lines.
    #[test]
    fn instructions_are_encoded_as_by_llvm() {
        let mut program = Assembler::default();
        let end = program.label();
        program.load(Width::Word64, R6, R1, 8); // r6 = *(u64 *)(r1 + 8)
        program.alu_with(Alu::ShiftRightSigned, R3, 63); // r3 s>>= 63
        program.alu(Alu::Add, R2, R10); // r2 += r10
        program.store(Width::Word32, R10, -12, R1); // *(u32 *)(r10 - 12) = r1
        program.atomic_add(R1, 8, R2); // lock *(u64 *)(r1 + 8) += r2
        program.jump_if(R3, If::Greater, R6, end); // if r3 > r6 goto +1
        program.call(Helper::RingReserve); // call 131
        program.place(end);
        program.exit(); // exit
        let bytes: Vec<[u8; 8]> = program
            .finish()
            .iter()
            .map(|i| {
                let mut bytes = [i.code, i.registers, 0, 0, 0, 0, 0, 0];
                bytes[2..4].copy_from_slice(&i.offset.to_le_bytes());
                bytes[4..].copy_from_slice(&i.immediate.to_le_bytes());
                bytes
            })
            .collect();
        assert_eq!(
            bytes,
            [
                [0x79, 0x16, 8, 0, 0, 0, 0, 0],
                [0xc7, 0x03, 0, 0, 63, 0, 0, 0],
                [0x0f, 0xa2, 0, 0, 0, 0, 0, 0],
                [0x63, 0x1a, 0xf4, 0xff, 0, 0, 0, 0],
                [0xdb, 0x21, 8, 0, 0, 0, 0, 0],
                [0x2d, 0x63, 1, 0, 0, 0, 0, 0],
                [0x85, 0, 0, 0, 131, 0, 0, 0],
                [0x95, 0, 0, 0, 0, 0, 0, 0],
            ]
        );
    }
}
