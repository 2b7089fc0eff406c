//! The rest of a refused request's body, which is read and thrown away.
//!
//! A server of HTTP/1.1 closes a connection of which it has not read everything. The kernel then
//! resets it, and the client may never see the answer that was sent before.

use std::{future::poll_fn, pin::Pin, time::Duration};

use bytes::Bytes;
use http::{Version, header, request::Parts};
use http_body::Body;
use tokio::{sync::Semaphore, time::timeout};

/// Discards the body of a request that is refused by its head, while the answer is sent.
pub(crate) fn discard<B>(head: &Parts, body: B, limit: Duration)
where
    B: Body<Data = Bytes> + Send + 'static,
{
    // The first read would ask a client that waits with its body to send it.
    if !head.headers.contains_key(header::EXPECT) {
        discard_rest(head.version, Box::pin(body), limit);
    }
}

/// Discards the rest of a body of which a part was read, while the answer is sent.
pub(crate) fn discard_rest<B>(version: Version, body: Pin<Box<B>>, limit: Duration)
where
    B: Body<Data = Bytes> + Send + 'static,
{
    // In HTTP/2 a stream ends alone.
    if version < Version::HTTP_2
        && !body.is_end_stream()
        && let Ok(place) = PLACES.try_acquire()
    {
        // Not tracked: the end of the server does not wait for it.
        tokio::spawn(async move {
            let _ = timeout(limit, read_to_end(body)).await;
            drop(place);
        });
    }
}

async fn read_to_end<B: Body<Data = Bytes>>(mut body: Pin<Box<B>>) {
    let mut left = DISCARDED;
    while left > 0
        && let Some(Ok(frame)) = poll_fn(|cx| body.as_mut().poll_frame(cx)).await
    {
        left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
    }
}

/// The number of bodies that a process discards simultaneously: a server buffers what it reads. In
/// a flood, the others are cut off.
static PLACES: Semaphore = Semaphore::const_new(32);

/// The bytes of one body that are read in vain. A client that sends more is cut off.
const DISCARDED: usize = 64 * 1024 * 1024;
