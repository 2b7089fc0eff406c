//! Decides by the answer of a look-up.

use std::time::Duration;

use crate::{
    attempt::settle::TURNED_UP,
    recovery::reconciler::{Lookup, Settings, pass::Outcome},
    stored::intent::{Intent, IntentState, IntentUpdate},
};

/// The change that a look-up makes to its intent.
#[derive(Debug)]
pub(super) struct Decision {
    pub(super) update: IntentUpdate,
    pub(super) attention: Option<String>,
    pub(super) outcome: Outcome,
}

impl Decision {
    fn new(update: IntentUpdate, outcome: Outcome) -> Self {
        Self { update, attention: None, outcome }
    }

    fn attention(update: IntentUpdate, attention: impl Into<String>, outcome: Outcome) -> Self {
        Self { update, attention: Some(attention.into()), outcome }
    }
}

impl Settings {
    /// Decides without a look-up: for a call that was not sent, and for an intent whose look-ups
    /// are used up.
    pub(super) fn without_asking(&self, intent: &Intent) -> Option<Decision> {
        if intent.state == (IntentState::Open { sent: false }) {
            return Some(Decision::new(IntentUpdate::Absent(None), Outcome::Absent));
        }
        // One more to confirm an absence, and one more for the last look at what was declared absent.
        let last = if matches!(intent.state, IntentState::Open { .. }) { 1 } else { 2 };
        let permitted = self.max_lookups.saturating_add(last);
        (intent.looks > permitted).then(|| self.nothing_learned(intent))
    }

    pub(super) fn decide(&self, intent: &Intent, lookup: Lookup) -> Decision {
        let open = matches!(intent.state, IntentState::Open { .. });
        match lookup {
            Lookup::Found(resource) if open => {
                Decision::new(IntentUpdate::Finalize(resource), Outcome::Found)
            }
            // It was declared absent, so a retry may have called again and made a second resource.
            Lookup::Found(resource) => {
                Decision::attention(IntentUpdate::Finalize(resource), TURNED_UP, Outcome::TurnedUp)
            }
            Lookup::NotFound if !open => Decision::new(IntentUpdate::Close, Outcome::Closed),
            // Not found twice, with a pause in between: the first may have come before the call arrived.
            Lookup::NotFound if intent.absences > 0 => {
                let recheck = Some(self.recheck_after).filter(|pause| !pause.is_zero());
                Decision::new(IntentUpdate::Absent(recheck), Outcome::Absent)
            }
            Lookup::NotFound => {
                let update = IntentUpdate::LookAgain { after: self.confirm_after, absences: 1 };
                Decision::new(update, Outcome::Again)
            }
            Lookup::Unknown if intent.looks >= self.max_lookups => self.nothing_learned(intent),
            Lookup::Unknown => {
                let after = self.backoff.jittered_after(intent.looks);
                Decision::new(IntentUpdate::LookAgain { after, absences: 0 }, Outcome::Again)
            }
        }
    }

    /// Never guesses: asks for attention. An intent that was declared absent stays absent.
    fn nothing_learned(&self, intent: &Intent) -> Decision {
        if matches!(intent.state, IntentState::Dead { .. }) {
            return Decision::new(IntentUpdate::Close, Outcome::Closed);
        }
        let attention = format!("looked up {} times without an answer", self.max_lookups.min(intent.looks));
        let update = IntentUpdate::LookAgain { after: Duration::ZERO, absences: intent.absences };
        Decision::attention(update, attention, Outcome::Attention)
    }
}
