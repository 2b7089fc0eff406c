//! Stores behind which another one works.

use std::pin::Pin;

use tower_idempotency::StoreError;

/// What `async_trait` makes of the result of a call.
pub type Call<'f, T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send + 'f>>;

/// In an `impl Store` of `async_trait`: the calls that only pass on to the store in this field.
macro_rules! forward_store {
    ($field:ident) => {
        $crate::support::forward::forward_store! { $field:
            prepare<>() -> Vec<String>;
            release<'a>(attempt: &'a tower_idempotency::store::Attempt) -> tower_idempotency::store::Fenced;
            hold<'a>(attempt: &'a tower_idempotency::store::Attempt) -> tower_idempotency::store::Fenced;
            get<'a, 'b>(consumer: &'a tower_idempotency::Consumer, key: &'b tower_idempotency::IdempotencyKey)
                -> Option<tower_idempotency::store::Record>;
            list<>(filter: tower_idempotency::store::RecordFilter, limit: u32) -> Vec<tower_idempotency::store::Record>;
            evict<'a, 'b>(consumer: &'a tower_idempotency::Consumer, key: &'b tower_idempotency::IdempotencyKey)
                -> bool;
            resolve<'a, 'b>(
                consumer: &'a tower_idempotency::Consumer,
                key: &'b tower_idempotency::IdempotencyKey,
                resolution: tower_idempotency::store::Resolution
            ) -> tower_idempotency::store::ResolveOutcome;
        }
    };
    ($field:ident: $($call:ident<$($life:lifetime),*>($($name:ident: $type:ty),*) -> $output:ty;)*) => {$(
        fn $call<'s, $($life,)* 'f>(&'s self, $($name: $type),*) -> $crate::support::forward::Call<'f, $output>
        where
            's: 'f,
            $($life: 'f,)*
        {
            self.$field.$call($($name),*)
        }
    )*};
}
pub(crate) use forward_store;

/// In an `impl RecoveryStore` of `async_trait`: the calls about anything but one intent, which pass on to this field.
#[allow(unused_macros, reason = "few tests have a store of their own with intents")]
macro_rules! forward_recovery {
    ($field:ident) => {
        $crate::support::forward::forward_store! { $field:
            take_dangling<>(limit: u32, pause: std::time::Duration) -> Vec<tower_idempotency::Intent>;
            get_intent<>(intent: tower_idempotency::UpstreamKey) -> Option<tower_idempotency::Intent>;
            list_intents<>(filter: tower_idempotency::intent::IntentFilter, limit: u32) -> Vec<tower_idempotency::Intent>;
            count_intents<>() -> tower_idempotency::intent::IntentCounts;
            find_phase<'a, 'b>(
                attempt: &'a tower_idempotency::store::Attempt,
                record: tower_idempotency::store::RecordId,
                name: &'b str
            ) -> Option<bytes::Bytes>;
            keep_request<'a, 'b>(
                attempt: &'a tower_idempotency::store::Attempt,
                record: tower_idempotency::store::RecordId,
                request: &'b bytes::Bytes,
                after: std::time::Duration
            ) -> tower_idempotency::store::Fenced;
            retain_record<'a, 'b>(
                consumer: &'a tower_idempotency::Consumer,
                key: &'b tower_idempotency::IdempotencyKey,
                record: tower_idempotency::store::RecordId
            ) -> tower_idempotency::store::Fenced;
            take_abandoned<>(limit: u32, pause: std::time::Duration) -> Vec<tower_idempotency::store::KeptRequest>;
            update_request<'a>(
                record: tower_idempotency::store::RecordId,
                tries: Option<u32>,
                update: &'a tower_idempotency::store::RequestUpdate
            ) -> tower_idempotency::store::Fenced;
            list_requests<>(limit: u32) -> Vec<tower_idempotency::store::KeptRequest>;
            purge_settled<>(retention: std::time::Duration, limit: u32) -> u64;
        }
    };
}
#[allow(unused_imports, reason = "as above")]
pub(crate) use forward_recovery;
