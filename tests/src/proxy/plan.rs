//! What a network does to those who speak over it, all of it following from one number.

use crate::random::Random;

/// What is done to a connection. Those that damage it leave its ends to notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Both directions end, between two frames.
    Cut,
    /// One direction ends.
    HalfCut,
    /// The connection is reset.
    Reset,
    /// It ends within a frame.
    Truncate,
    /// One bit or byte is another.
    Corrupt,
    /// Bytes come that nobody sent.
    Insert,
    /// A frame comes twice, numbered as it was or as the next one.
    Duplicate,
    /// A frame comes after its successor, both numbered as they were or as they come.
    Swap,
    /// A frame waits until others have passed, for a little while.
    Delay,
    /// Nothing passes in either direction, for a little while.
    Freeze,
    /// A frame comes in many pieces.
    Dribble,
    /// Bytes of a frame never come.
    Omit,
    /// A frame never comes.
    Lose,
    /// The connection ends, and the next ones are not taken.
    Refuse,
    /// All connections end, and nobody listens any more.
    Gone,
}

impl Kind {
    /// Each with how often it is done. Of those with 1 the ends may learn by silence alone, which takes them seconds. `Gone` is
    /// a plan of its own.
    pub const ALL: [(Self, u64); 15] = [
        (Self::Cut, 40),
        (Self::HalfCut, 80),
        (Self::Reset, 80),
        (Self::Truncate, 160),
        (Self::Corrupt, 240),
        (Self::Insert, 80),
        (Self::Duplicate, 120),
        (Self::Swap, 120),
        (Self::Delay, 80),
        (Self::Freeze, 80),
        (Self::Dribble, 80),
        (Self::Omit, 1),
        (Self::Lose, 1),
        (Self::Refuse, 80),
        (Self::Gone, 0),
    ];

    fn any(random: &mut Random) -> Self {
        let all = Self::ALL.iter().map(|(_, weight)| weight).sum();
        let mut at = random.below(all);
        for (kind, weight) in Self::ALL {
            if at < weight {
                return kind;
            }
            at -= weight;
        }
        Self::Cut
    }
}

/// Whither a frame goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To who connected.
    Client,
    /// To who was connected to.
    Server,
}

/// What happens to one frame.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    /// What.
    pub kind: Kind,
    /// On which way.
    pub towards: Direction,
    /// Which one on that way of that connection, from 0.
    pub frame: u64,
    /// Where in it, how long, and so on follow from this.
    pub seed: u64,
}

/// What happens to all connections, one after the other.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    seed: u64,
    /// Faults until all goes well.
    pub faults: u32,
    /// The first connection's first frames are not spared: who connects for the first time may give up.
    pub from_the_start: bool,
    /// There is one fault, after which nobody is reached any more.
    pub gone: bool,
}

/// Frames in each direction before the first connection is open and the image's metadata is there.
const OPENING: u64 = 2;

impl Plan {
    /// A network that does what it should.
    pub const NONE: Self = Self {
        seed: 0,
        faults: 0,
        from_the_start: false,
        gone: false,
    };

    /// The plan of this number.
    pub fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let gone = random.once_in(40);
        Self {
            seed: random.number(),
            faults: if gone { 1 } else { 1 + random.below(8) as u32 },
            from_the_start: random.once_in(16),
            gone,
        }
    }

    /// What happens to the connection of this number, in the order of the frames.
    pub fn of_connection(&self, index: u64) -> Vec<Fault> {
        if self.faults == 0 {
            return Vec::new();
        }
        let mut random = Random::new(self.seed ^ index.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let first = if index == 0 && !self.from_the_start {
            OPENING
        } else {
            0
        };
        let mut next = [first; 2];
        (0..3)
            .map(|_| {
                let towards = random.choose(&[Direction::Client, Direction::Client, Direction::Server]);
                let next = &mut next[towards as usize];
                // Early or late: most often within the first frames, at times after hundreds.
                let magnitude = random.below(10);
                let frame = *next + random.below(1 << magnitude);
                *next = frame + 1;
                let kind = Kind::any(&mut random);
                Fault {
                    kind: if self.gone { Kind::Gone } else { kind },
                    towards,
                    frame,
                    seed: random.number(),
                }
            })
            .collect()
    }
}
