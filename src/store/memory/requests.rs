//! One kept request, and the outcome of a try to send it again.

use tokio::time::Instant;

use super::entry::LONGEST;
use crate::stored::request::{KeptRequest, RequestUpdate};

/// A request and the time of the next try. `None` if there is none, because the request needs
/// attention.
pub(super) struct Request {
    pub(super) kept: KeptRequest,
    pub(super) next_at: Option<Instant>,
}

impl Request {
    /// Returns `true` if a caller that has seen so many tries may update it. `None` stands for an
    /// operator.
    pub(super) fn permits(&self, tries: Option<u32>) -> bool {
        tries.is_none_or(|tries| self.kept.tries == tries && self.next_at.is_some())
    }

    pub(super) fn update(&mut self, tries: Option<u32>, update: &RequestUpdate, now: Instant) {
        let (next_at, tried, attention) = match update {
            RequestUpdate::SendAgain { after, tried } => (Some(now + (*after).min(LONGEST)), *tried, None),
            RequestUpdate::NeedsAttention(what) => (None, true, Some(what.clone())),
            RequestUpdate::Done => return,
        };
        // An operator starts the count again. A try that was not sent does not count.
        self.kept.tries = match tries {
            None => 0,
            Some(tries) if tried => tries,
            Some(tries) => tries.saturating_sub(1),
        };
        (self.next_at, self.kept.attention) = (next_at, attention);
    }
}
