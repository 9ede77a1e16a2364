//! Instructions one behind the other, and jumps to where a label will be.

use super::Helper;

/// One instruction as the kernel reads it: opcode, registers, offset, immediate.
pub(crate) type Instruction = [u8; 8];

/// The registers. The first six are anybody's after a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Reg {
    R0 = 0,
    R1 = 1,
    R2 = 2,
    R3 = 3,
    R4 = 4,
    R5 = 5,
    R6 = 6,
    R7 = 7,
    R8 = 8,
    R9 = 9,
    /// The end of the stack, which lies before it.
    Frame = 10,
}

/// What one load or store moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Size {
    Word = 0x00,
    Half = 0x08,
    Byte = 0x10,
    Double = 0x18,
}

/// When a jump is taken; all compare without a sign.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Compare {
    Equal = 0x10,
    Above = 0x20,
    /// Have both a bit in common?
    Common = 0x40,
    Unequal = 0x50,
    Below = 0xa0,
}

/// A place in a program, known or yet to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Label(usize);

/// A program in the making.
#[derive(Debug, Default)]
pub(crate) struct Assembler {
    instructions: Vec<Instruction>,
    /// Where each label is, once it is.
    labels: Vec<Option<usize>>,
    /// Jumps, and to which label.
    jumps: Vec<(usize, Label)>,
}

const LD_IMM: u8 = 0x00;
const LDX: u8 = 0x01;
const ST: u8 = 0x02;
const STX: u8 = 0x03;
const ALU: u8 = 0x04;
const JMP: u8 = 0x05;
const JMP32: u8 = 0x06;
const ALU64: u8 = 0x07;
/// The second operand is a register.
const BY_REGISTER: u8 = 0x08;
const MEM: u8 = 0x60;
const ATOMIC: u8 = 0xc0;
const ADD: u8 = 0x00;
const AND: u8 = 0x50;
const RSH: u8 = 0x70;
const MOV: u8 = 0xb0;
const END_TO_BE: u8 = 0xd8;
const ALWAYS: u8 = 0x00;
const CALL: u8 = 0x80;
const EXIT: u8 = 0x90;
/// The immediate of a load is a descriptor, and what is meant is the map behind it.
const PSEUDO_MAP_FD: u8 = 1;

impl Assembler {
    fn put(&mut self, opcode: u8, (to, from): (u8, u8), offset: i16, immediate: i32) {
        let mut one = [opcode, registers(to, from), 0, 0, 0, 0, 0, 0];
        one[2..4].copy_from_slice(&offset.to_ne_bytes());
        one[4..].copy_from_slice(&immediate.to_ne_bytes());
        self.instructions.push(one);
    }

    /// A label for a place that is not reached yet.
    pub(crate) fn label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() - 1)
    }

    /// Here it is.
    pub(crate) fn bind(&mut self, label: Label) {
        self.labels[label.0] = Some(self.instructions.len());
    }

    pub(crate) fn set(&mut self, to: Reg, value: i32) {
        self.put(ALU64 | MOV, (to as u8, 0), 0, value);
    }

    pub(crate) fn copy(&mut self, to: Reg, from: Reg) {
        self.put(ALU64 | MOV | BY_REGISTER, (to as u8, from as u8), 0, 0);
    }

    pub(crate) fn add(&mut self, to: Reg, value: i32) {
        self.put(ALU64 | ADD, (to as u8, 0), 0, value);
    }

    pub(crate) fn add_both(&mut self, to: Reg, from: Reg) {
        self.put(ALU64 | ADD | BY_REGISTER, (to as u8, from as u8), 0, 0);
    }

    pub(crate) fn mask(&mut self, to: Reg, bits: i32) {
        self.put(ALU64 | AND, (to as u8, 0), 0, bits);
    }

    pub(crate) fn shift_right(&mut self, to: Reg, bits: i32) {
        self.put(ALU64 | RSH, (to as u8, 0), 0, bits);
    }

    /// The lower 16 bits from this machine's order of octets to a packet's, or back.
    pub(crate) fn swap_half(&mut self, register: Reg) {
        self.put(ALU | END_TO_BE, (register as u8, 0), 0, 16);
    }

    /// What stands `offset` behind where `base` points.
    pub(crate) fn load(&mut self, size: Size, to: Reg, (base, offset): (Reg, i16)) {
        let opcode = LDX | MEM | size as u8;
        self.put(opcode, (to as u8, base as u8), offset, 0);
    }

    pub(crate) fn store(&mut self, size: Size, (base, offset): (Reg, i16), from: Reg) {
        let opcode = STX | MEM | size as u8;
        self.put(opcode, (base as u8, from as u8), offset, 0);
    }

    /// Stores the lowest octets of `value`.
    pub(crate) fn store_value(&mut self, size: Size, (base, offset): (Reg, i16), value: i32) {
        self.put(ST | MEM | size as u8, (base as u8, 0), offset, value);
    }

    /// Adds to 64 bits that others add to at the same time.
    pub(crate) fn add_shared(&mut self, (base, offset): (Reg, i16), from: Reg) {
        let opcode = STX | ATOMIC | Size::Double as u8;
        self.put(opcode, (base as u8, from as u8), offset, 0);
    }

    /// The map behind a descriptor.
    pub(crate) fn map(&mut self, to: Reg, descriptor: i32) {
        let opcode = LD_IMM | Size::Double as u8;
        self.put(opcode, (to as u8, PSEUDO_MAP_FD), 0, descriptor);
        // The upper half of what is loaded.
        self.put(0, (0, 0), 0, 0);
    }

    pub(crate) fn call(&mut self, helper: Helper) {
        self.put(JMP | CALL, (0, 0), 0, helper as i32);
    }

    pub(crate) fn exit(&mut self) {
        self.put(JMP | EXIT, (0, 0), 0, 0);
    }

    pub(crate) fn go_to(&mut self, label: Label) {
        self.jumps.push((self.instructions.len(), label));
        self.put(JMP | ALWAYS, (0, 0), 0, 0);
    }

    /// To `label` if the whole register compares so; pointers may be asked whether they are 0.
    pub(crate) fn jump_if(&mut self, left: Reg, is: Compare, right: i32, label: Label) {
        self.jumps.push((self.instructions.len(), label));
        self.put(JMP | is as u8, (left as u8, 0), 0, right);
    }

    /// The same of the lower 32 bits.
    pub(crate) fn jump_if_word(&mut self, left: Reg, is: Compare, right: i32, label: Label) {
        self.jumps.push((self.instructions.len(), label));
        self.put(JMP32 | is as u8, (left as u8, 0), 0, right);
    }

    /// The same of two registers.
    pub(crate) fn jump_if_both(&mut self, left: Reg, is: Compare, right: Reg, label: Label) {
        self.jumps.push((self.instructions.len(), label));
        let opcode = JMP | is as u8 | BY_REGISTER;
        self.put(opcode, (left as u8, right as u8), 0, 0);
    }

    /// The program. A jump to a label that was never bound leads nowhere, which the kernel refuses.
    pub(crate) fn finish(mut self) -> Vec<Instruction> {
        for (at, label) in self.jumps {
            let to = self.labels[label.0].unwrap_or(usize::MAX);
            // From the instruction behind the jump.
            let distance = to.wrapping_sub(at + 1) as i16;
            self.instructions[at][2..4].copy_from_slice(&distance.to_ne_bytes());
        }
        self.instructions
    }
}

/// Two registers in one octet.
fn registers(to: u8, from: u8) -> u8 {
    if cfg!(target_endian = "big") {
        to << 4 | from
    } else {
        from << 4 | to
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_endian = "little")]
    fn instructions_are_laid_out_as_the_kernel_reads_them() {
        let mut program = Assembler::default();
        let out = program.label();
        program.copy(Reg::R6, Reg::R1);
        program.load(Size::Half, Reg::R0, (Reg::R7, 12));
        program.jump_if(Reg::R0, Compare::Unequal, 8, out);
        program.store(Size::Word, (Reg::Frame, -4), Reg::R0);
        program.map(Reg::R1, 5);
        program.call(Helper::MapLookup);
        program.add_shared((Reg::R0, 8), Reg::R1);
        program.add_both(Reg::R1, Reg::R2);
        program.mask(Reg::R1, 0xf0);
        program.shift_right(Reg::R1, 2);
        program.bind(out);
        program.set(Reg::R0, -1);
        program.exit();
        let expected = [
            [0xbf, 0x16, 0, 0, 0, 0, 0, 0],
            [0x69, 0x70, 12, 0, 0, 0, 0, 0],
            [0x55, 0x00, 8, 0, 8, 0, 0, 0],
            [0x63, 0x0a, 0xfc, 0xff, 0, 0, 0, 0],
            [0x18, 0x11, 0, 0, 5, 0, 0, 0],
            [0; 8],
            [0x85, 0, 0, 0, 1, 0, 0, 0],
            [0xdb, 0x10, 8, 0, 0, 0, 0, 0],
            [0x0f, 0x21, 0, 0, 0, 0, 0, 0],
            [0x57, 0x01, 0, 0, 0xf0, 0, 0, 0],
            [0x77, 0x01, 0, 0, 2, 0, 0, 0],
            [0xb7, 0, 0, 0, 0xff, 0xff, 0xff, 0xff],
            [0x95, 0, 0, 0, 0, 0, 0, 0],
        ];
        assert_eq!(program.finish(), expected);
    }
}
