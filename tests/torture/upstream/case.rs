//! What happens to payouts.

use std::fmt;

use crate::{
    support::upstream::{Act, Ending},
    trap::Point,
};

/// What happens to a payout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Case {
    /// Its server kills itself at this point.
    Killed(Point),
    /// Its server is killed when the upstream has received the call, and has not made the transfer yet.
    KilledWhileCalled,
    /// Its server is killed when the upstream has made the transfer, and has not answered.
    KilledWhileMade,
    /// The upstream makes the transfer and answers 500.
    ServerError,
    /// The upstream makes the transfer and resets the connection.
    Reset,
    /// The handler fails after the call.
    HandlerFails,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Killed(point) => point.name(),
            Self::KilledWhileCalled => "called",
            Self::KilledWhileMade => "made",
            Self::ServerError => "server-error",
            Self::Reset => "reset",
            Self::HandlerFails => "handler-fails",
        })
    }
}

impl Case {
    pub const LOST_ANSWERS: [Self; 3] = [Self::ServerError, Self::Reset, Self::HandlerFails];
    pub const ALL: [Self; 10] = [
        Self::Killed(Point::Opening),
        Self::Killed(Point::Opened),
        Self::KilledWhileCalled,
        Self::KilledWhileMade,
        Self::Killed(Point::Answered),
        Self::Killed(Point::Finalized),
        Self::Killed(Point::Written),
        Self::ServerError,
        Self::Reset,
        Self::HandlerFails,
    ];

    pub fn key(self, number: usize) -> String {
        format!("{self}-{number}")
    }

    pub fn what(self) -> String {
        match self {
            Self::Killed(_) | Self::KilledWhileCalled | Self::KilledWhileMade => {
                format!("killed at '{self}'")
            }
            Self::ServerError | Self::Reset | Self::HandlerFails => format!("'{self}'"),
        }
    }

    /// How often the upstream was called when it has happened.
    pub fn calls(self) -> usize {
        usize::from(!matches!(self, Self::Killed(Point::Opening | Point::Opened)))
    }

    /// Whether the upstream has made the transfer when it has happened.
    pub fn is_made(self) -> bool {
        self.calls() > 0 && self != Self::KilledWhileCalled
    }

    /// Whether nobody has recorded what became of the call when it has happened.
    pub fn is_unknown(self) -> bool {
        match self {
            Self::Killed(point) => matches!(point, Point::Opened | Point::Answered),
            Self::KilledWhileCalled | Self::KilledWhileMade | Self::ServerError | Self::Reset => true,
            Self::HandlerFails => false,
        }
    }

    /// What the upstream does with the first call, if not its work.
    pub fn act(self) -> Option<Act> {
        match self {
            Self::Killed(_) | Self::HandlerFails => None,
            Self::KilledWhileCalled => Some(Act::before(Ending::Silence)),
            Self::KilledWhileMade => Some(Act::after(Ending::Silence)),
            Self::ServerError => Some(Act::after(Ending::Status(500))),
            Self::Reset => Some(Act::after(Ending::Reset)),
        }
    }
}
