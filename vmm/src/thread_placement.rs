//! On which CPUs the threads of vCPUs and of the pager run.
//!
//! A vCPU that waits for a page has given its CPU away, so a pager thread on the same CPU costs it nothing, while one on another
//! CPU has to be woken there, and wakes the vCPU back. But a thread that is bound to a CPU cannot move away from others that want
//! it. `docs/fault-path.md` has figures.

use rustix::thread::CpuSet;
use thiserror::Error;

/// The policy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Placement {
    /// The kernel's scheduler decides.
    #[default]
    Free,
    /// Each vCPU is bound to a CPU, and the pager's threads that serve demand to the same CPUs.
    Beside,
    /// Each vCPU is bound to a CPU, and the pager's threads that serve demand to all others.
    Apart,
}

/// Why threads cannot be placed.
#[derive(Debug, Error)]
pub enum PlacementError {
    /// The CPUs that this process may use are not known.
    #[error("cannot find out which CPUs this process may use")]
    Unknown(#[source] std::io::Error),
    /// vCPUs take all CPUs.
    #[error(
        "--cpus placement=apart leaves no CPU for the pager: this process may use {cpus}, and the VM has {vcpus} vCPUs; \
         choose fewer, or placement=free"
    )]
    NoneLeft {
        /// CPUs of this process.
        cpus: usize,
        /// vCPUs of the VM.
        vcpus: u32,
    },
}

/// The CPUs that each thread is bound to, if any.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Places {
    vcpus: Vec<usize>,
    /// Of the threads that serve demand.
    pub(crate) demand: Option<CpuSet>,
}

impl Places {
    /// Chooses among the CPUs that the calling thread may use.
    pub(crate) fn choose(placement: Placement, vcpus: u32) -> Result<Self, PlacementError> {
        if placement == Placement::Free {
            return Ok(Self::default());
        }
        let usable =
            rustix::thread::sched_getaffinity(None).map_err(|errno| PlacementError::Unknown(errno.into()))?;
        let usable: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|cpu| usable.is_set(*cpu)).collect();
        Self::among(&usable, rustix::thread::sched_getcpu(), placement, vcpus)
    }

    /// The first vCPU goes to `current` or the next one that is usable, so that the VMs of a host spread as their programs did.
    fn among(
        usable: &[usize],
        current: usize,
        placement: Placement,
        vcpus: u32,
    ) -> Result<Self, PlacementError> {
        let first = usable.iter().position(|cpu| *cpu >= current).unwrap_or(0);
        let of_vcpus: Vec<usize> = usable
            .iter()
            .cycle()
            .skip(first)
            .take((vcpus as usize).min(usable.len()))
            .copied()
            .collect();
        let is_beside = placement == Placement::Beside;
        let mut demand = CpuSet::new();
        for cpu in usable.iter().filter(|cpu| of_vcpus.contains(cpu) == is_beside) {
            demand.set(*cpu);
        }
        if demand.count() == 0 {
            return Err(PlacementError::NoneLeft {
                cpus: usable.len(),
                vcpus,
            });
        }
        Ok(Self {
            vcpus: of_vcpus,
            demand: Some(demand),
        })
    }

    /// Binds the calling thread, which runs the vCPU with this number.
    pub(crate) fn bind_vcpu(&self, index: u32) {
        let Some(cpu) = self.vcpus.get(index as usize % self.vcpus.len().max(1)) else {
            return;
        };
        let mut set = CpuSet::new();
        set.set(*cpu);
        if let Err(error) = rustix::thread::sched_setaffinity(None, &set) {
            // Somebody took the CPU away meanwhile. The VM runs all the same.
            tracing::warn!(%error, vcpu = index, cpu, "cannot bind a vCPU to its CPU");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(cpus: &[usize]) -> CpuSet {
        let mut set = CpuSet::new();
        for cpu in cpus {
            set.set(*cpu);
        }
        set
    }

    #[test]
    fn beside_is_where_vcpus_are_and_apart_where_none_is() {
        let places = |placement, vcpus| Places::among(&[1, 3, 4, 9], 4, placement, vcpus).unwrap();
        let beside = places(Placement::Beside, 3);
        assert_eq!(
            (beside.vcpus, beside.demand),
            (vec![4, 9, 1], Some(set(&[1, 4, 9])))
        );
        let apart = places(Placement::Apart, 3);
        assert_eq!((apart.vcpus, apart.demand), (vec![4, 9, 1], Some(set(&[3]))));
    }

    #[test]
    fn more_vcpus_than_cpus_share_them() {
        let places = Places::among(&[0, 1], 1, Placement::Beside, 5).unwrap();
        assert_eq!((places.vcpus, places.demand), (vec![1, 0], Some(set(&[0, 1]))));
    }

    #[test]
    fn apart_of_all_is_nowhere() {
        let error = Places::among(&[0, 1], 0, Placement::Apart, 2).unwrap_err();
        assert!(matches!(error, PlacementError::NoneLeft { cpus: 2, vcpus: 2 }));
    }

    #[test]
    fn free_binds_nothing() {
        assert_eq!(Places::choose(Placement::Free, 4).unwrap(), Places::default());
    }
}
