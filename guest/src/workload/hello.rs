//! Says that the machine is up.

use crate::exit_code::ExitCode;
use crate::machine::{Combine, Machine};

/// Runs on every CPU.
pub fn run(machine: &impl Machine) -> ExitCode {
    // Every CPU answers for itself.
    let cpus = machine.combine(1, Combine::Sum);
    if machine.cpu() == 0 {
        let ram_mib = machine.ram_bytes().div_ceil(1 << 20);
        machine.print(format_args!("workload=hello cpus={cpus} ram_mib={ram_mib}"));
    }
    ExitCode::Ok
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::fake::Shared;

    #[test]
    fn hello_counts_the_cpus() {
        let shared = Shared::new(3);
        assert_eq!(shared.run(|machine| run(machine)), ExitCode::Ok);
        assert_eq!(shared.lines(), ["workload=hello cpus=3 ram_mib=256"]);
    }
}
