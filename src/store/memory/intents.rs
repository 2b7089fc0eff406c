//! One intent: when it may be called, and by which update it may be changed.

use std::{collections::HashMap, time::Duration};

use tokio::time::Instant;

use super::entry::{Identity, LONGEST, Now};
use crate::{
    store::recovery::ABSENT,
    stored::intent::{CallId, Intent, IntentFence, IntentState, IntentUpdate, Opening, UpstreamKey},
};

#[derive(Clone)]
pub(super) struct StoredIntent {
    /// The intent as it is shown, without the values that depend on the time.
    pub(super) intent: Intent,
    /// The end of the time in which the upstream recognizes its call by the key.
    repeatable_until: Instant,
    dangling_at: Instant,
    look: Look,
    /// A call before the last one may have arrived.
    sent_before: bool,
    /// A call may have been sent, even if the upstream did not know it later.
    ever_sent: bool,
    /// The same of the calls before the last one.
    ever_sent_before: bool,
}

/// The next look-up.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Look {
    At(Instant),
    /// It needs the attention of an operator instead.
    ByOperator,
    Never,
}

impl StoredIntent {
    pub(super) fn opened(opening: &Opening, now: Now) -> Self {
        let after = |duration: Duration| now.instant + duration.min(LONGEST);
        Self {
            intent: Intent::opened(opening, now.shown),
            repeatable_until: after(opening.repeatable_for),
            dangling_at: after(opening.dangling_after),
            look: Look::At(after(opening.dangling_after)),
            sent_before: false,
            ever_sent: true,
            ever_sent_before: false,
        }
    }

    /// It may be called again in three cases: the upstream recognizes the call, no call has
    /// arrived, or the upstream does not know it. Other arguments may be called only if no call was
    /// ever sent.
    pub(super) fn is_callable(&self, opening: &Opening, now: Now) -> bool {
        let allowed = match self.intent.state {
            IntentState::Open { sent: true } => {
                self.repeatable_until > now.instant && !opening.repeatable_for.is_zero()
            }
            IntentState::Open { sent: false } => true,
            IntentState::Dead { absent, .. } => absent,
            IntentState::Finalized(_) => false,
        };
        let same_arguments = self.intent.arguments == opening.arguments;
        allowed && (same_arguments || !self.ever_sent) && self.intent.call != opening.call
    }

    /// The intent after another call. The upstream remembers the first of the calls that may have
    /// arrived.
    pub(super) fn called_again(&self, opening: &Opening, now: Now) -> Self {
        let again = Self { ever_sent_before: self.ever_sent, ..Self::opened(opening, now) };
        let intent = Intent {
            subject: self.intent.subject.clone(),
            created_at: self.intent.created_at,
            calls: self.intent.calls.saturating_add(1),
            ..again.intent
        };
        if !self.may_have_arrived() {
            return Self { intent, ..again };
        }
        let repeatable_until = self.repeatable_until.min(again.repeatable_until);
        Self { intent, repeatable_until, sent_before: true, ..again }
    }

    /// Returns `true` if the fence of an update holds. An intent is in flight while its attempt
    /// owns the record.
    pub(super) fn permits(&self, fence: IntentFence, update: &IntentUpdate, is_in_flight: bool) -> bool {
        let Intent { state, call: last, takes, .. } = &self.intent;
        let open = self.is_open();
        let absent = matches!(state, IntentState::Dead { absent: true, .. });
        match fence {
            IntentFence::Call(call) => open && *last == call,
            IntentFence::AbsentCall(call) => absent && *last == call,
            IntentFence::Lookup { call, takes: seen, open: was_open } => {
                *last == call && *takes == seen && if was_open { open } else { absent }
            }
            IntentFence::Operator => {
                let again = matches!(update, IntentUpdate::LookAgain { .. });
                let finalized = matches!(state, IntentState::Finalized(_));
                !finalized && !is_in_flight && (!again || open || absent)
            }
            IntentFence::Attention => !open && self.intent.attention.is_some(),
        }
    }

    pub(super) fn update(
        &mut self,
        fence: IntentFence,
        update: &IntentUpdate,
        attention: Option<&str>,
        now: Now,
    ) {
        let outcome = match update {
            IntentUpdate::Finalize(resource) => Some(IntentState::Finalized(resource.clone())),
            IntentUpdate::Refuse(reason) => Some(IntentState::Dead { reason: reason.clone(), absent: false }),
            IntentUpdate::Absent(_) => Some(IntentState::Dead { reason: ABSENT.to_owned(), absent: true }),
            IntentUpdate::NotSent | IntentUpdate::LookAgain { .. } | IntentUpdate::Close => None,
        };
        let intent = &mut self.intent;
        if let Some(state) = outcome {
            (intent.state, intent.settled_at) = (state, Some(now.shown));
        }
        if let (IntentUpdate::NotSent, IntentState::Open { sent }) = (update, &mut intent.state) {
            // The last call has not arrived, but an earlier one may have.
            *sent = self.sent_before;
            self.ever_sent = self.ever_sent_before;
        }
        intent.attention = attention.map(str::to_owned);
        // An intent that needs attention is not looked up any more, even if the update asks for it.
        self.look = match update {
            _ if attention.is_some() => Look::ByOperator,
            IntentUpdate::NotSent => self.look,
            IntentUpdate::Absent(Some(after)) => self.look_again(fence, *after, 0, now),
            IntentUpdate::LookAgain { after, absences } => self.look_again(fence, *after, *absences, now),
            IntentUpdate::Finalize(_)
            | IntentUpdate::Refuse(_)
            | IntentUpdate::Absent(None)
            | IntentUpdate::Close => Look::Never,
        };
    }

    fn look_again(&mut self, fence: IntentFence, after: Duration, absences: u32, now: Now) -> Look {
        self.intent.absences = absences;
        // An operator has it looked up as if for the first time.
        if matches!(fence, IntentFence::Operator) {
            self.intent.looks = 0;
        }
        Look::At(now.instant + after.min(LONGEST))
    }

    /// The time since which its look-up is due.
    pub(super) fn due_since(&self, now: Now) -> Option<Instant> {
        match self.look {
            Look::At(at) if at <= now.instant => Some(at),
            Look::At(_) | Look::ByOperator | Look::Never => None,
        }
    }

    /// Takes it for a look-up.
    pub(super) fn take(&mut self, pause: Duration, now: Now) -> Intent {
        self.look = Look::At(now.instant + pause.min(LONGEST));
        self.intent.looks = self.intent.looks.saturating_add(1);
        self.intent.takes = self.intent.takes.saturating_add(1);
        self.show(now)
    }

    pub(super) fn show(&self, now: Now) -> Intent {
        let dangling = self.is_open() && self.dangling_at <= now.instant;
        Intent { age: self.age(now), dangling, ..self.intent.clone() }
    }

    pub(super) fn age(&self, now: Now) -> Duration {
        now.shown.duration_since(self.intent.created_at).unwrap_or_default()
    }

    /// The identity of its record.
    pub(super) fn identity(&self) -> Identity {
        (self.intent.consumer.clone(), self.intent.key.clone())
    }

    pub(super) fn is_open(&self) -> bool {
        matches!(self.intent.state, IntentState::Open { .. })
    }

    pub(super) fn is_open_by(&self, call: CallId) -> bool {
        self.is_open() && self.intent.call == call
    }

    /// The last call may have arrived, and its outcome is unknown.
    fn may_have_arrived(&self) -> bool {
        matches!(self.intent.state, IntentState::Open { sent: true })
    }

    /// The end of the time in which its record may be taken over. `None` if that time has no end.
    pub(super) fn repeatable_until(&self) -> Option<Instant> {
        self.may_have_arrived().then_some(self.repeatable_until)
    }

    /// A person or a reconciler must look at it.
    fn is_waiting(&self) -> bool {
        self.is_open() || self.look != Look::Never
    }

    pub(super) fn size(&self) -> usize {
        let payload = match &self.intent.state {
            IntentState::Finalized(resource) => resource.payload.as_ref().map_or(0, bytes::Bytes::len),
            IntentState::Open { .. } | IntentState::Dead { .. } => 0,
        };
        self.intent.arguments.len() + payload
    }
}

/// Intents. The few that a person or a reconciler must look at are kept apart, so that they are
/// found quickly.
#[derive(Default)]
pub(super) struct Intents {
    pub(super) waiting: HashMap<UpstreamKey, StoredIntent>,
    pub(super) settled: HashMap<UpstreamKey, StoredIntent>,
}

impl Intents {
    pub(super) fn get(&self, key: UpstreamKey) -> Option<&StoredIntent> {
        self.waiting.get(&key).or_else(|| self.settled.get(&key))
    }

    pub(super) fn all(&self) -> impl Iterator<Item = &StoredIntent> {
        self.waiting.values().chain(self.settled.values())
    }

    /// Stores an intent and returns the one that it replaces.
    pub(super) fn put(&mut self, kept: StoredIntent) -> Option<StoredIntent> {
        let key = kept.intent.upstream_key;
        // An update may move an intent between the two maps.
        let old = self.remove(key);
        let intents = if kept.is_waiting() { &mut self.waiting } else { &mut self.settled };
        intents.insert(key, kept);
        old
    }

    pub(super) fn remove(&mut self, key: UpstreamKey) -> Option<StoredIntent> {
        self.waiting.remove(&key).or_else(|| self.settled.remove(&key))
    }
}
