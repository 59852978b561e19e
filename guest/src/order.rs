//! In which order a workload visits its pages.

use crate::permutation::Permutation;

/// The order that the command line asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Ascending.
    Sequential,
    /// A permutation that the seed chooses.
    Random {
        /// Chooses the permutation.
        seed: u64,
    },
    /// Every `stride`-th page, then every `stride`-th page after the first, and so on until each had its turn.
    Stride {
        /// Distance in pages, at least 1.
        stride: u64,
    },
}

/// An [`Order`] for a given number of pages: a bijection of `0..n`, from the turn to the page.
#[derive(Clone, Copy, Debug)]
pub enum Sequence {
    /// Turn `i` is page `i`.
    Sequential,
    /// As the permutation says.
    Random(Permutation),
    /// Column by column of a table that is `stride` wide.
    Stride {
        /// Width of the table.
        stride: u64,
        /// Rows that are full.
        rows: u64,
        /// Columns that have one page more than `rows`.
        longer: u64,
    },
}

impl Order {
    /// The order of `n` pages.
    pub fn of(self, n: u64) -> Sequence {
        match self {
            Order::Sequential => Sequence::Sequential,
            Order::Random { seed } => Sequence::Random(Permutation::new(seed, n)),
            Order::Stride { stride } => Sequence::Stride {
                stride,
                rows: n / stride,
                longer: n % stride,
            },
        }
    }
}

impl Sequence {
    /// The page whose turn it is. `turn` must be below the number of pages.
    pub fn page(&self, turn: u64) -> u64 {
        match *self {
            Sequence::Sequential => turn,
            Sequence::Random(permutation) => permutation.at(turn),
            Sequence::Stride { stride, rows, longer } => {
                let in_longer = longer * (rows + 1);
                let (column, row) = if turn < in_longer {
                    (turn / (rows + 1), turn % (rows + 1))
                } else {
                    let rest = turn - in_longer;
                    (longer + rest / rows, rest % rows)
                };
                row * stride + column
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pages(order: Order, n: u64) -> Vec<u64> {
        let sequence = order.of(n);
        (0..n).map(|turn| sequence.page(turn)).collect()
    }

    #[test]
    fn strides_go_column_by_column() {
        assert_eq!(
            pages(Order::Stride { stride: 4 }, 10),
            [0, 4, 8, 1, 5, 9, 2, 6, 3, 7]
        );
    }

    proptest! {
        #[test]
        fn every_order_visits_every_page_once(n in 1u64..3000, stride in 1u64..4000, seed: u64) {
            for order in [Order::Sequential, Order::Random { seed }, Order::Stride { stride }] {
                let mut visited = pages(order, n);
                visited.sort_unstable();
                prop_assert!(visited.into_iter().eq(0..n), "{order:?}");
            }
        }
    }
}
