//! Reads whole bodies, within limits.

use std::{
    collections::VecDeque,
    error::Error,
    future::{Future, poll_fn},
    iter::successors,
    pin::Pin,
    sync::Arc,
    task::Poll,
    time::Duration,
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use http_body_util::LengthLimitError;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    time::{Instant, timeout, timeout_at},
};

use crate::{
    error::BoxError,
    rejection::{Rejection, RejectionCode},
};

/// A whole body.
#[derive(Clone, Debug, Default)]
pub(crate) struct Buffered {
    pub(crate) data: Bytes,
    pub(crate) trailers: Option<HeaderMap>,
}

/// Limits on the bodies of requests.
#[derive(Clone, Debug)]
pub(crate) struct RequestLimits {
    /// Bytes of one body.
    pub(crate) body_limit: u32,
    /// Bytes of all bodies in memory.
    pub(crate) total_limit: usize,
    /// The bytes that are left of them, one permit each.
    pub(crate) free: Arc<Semaphore>,
    pub(crate) timeout: Duration,
}

impl Default for RequestLimits {
    fn default() -> Self {
        Self {
            body_limit: 1024 * 1024,
            total_limit: BUFFER_LIMIT,
            free: Arc::new(Semaphore::new(BUFFER_LIMIT)),
            timeout: Duration::from_secs(30),
        }
    }
}

impl RequestLimits {
    /// Panics if no body would fit.
    #[track_caller]
    pub(crate) fn check(&self) {
        let Self { body_limit, total_limit, .. } = self;
        assert!(
            usize::try_from(*body_limit).is_ok_and(|limit| limit <= *total_limit),
            "a request body of {body_limit} bytes would never fit the {total_limit} bytes for all bodies \
             together: raise with_request_buffer_limit, or lower with_request_body_limit"
        );
    }

    /// Refuses a body that is announced to be too large, before any of it is read. Nothing else is
    /// taken from what a client announces.
    pub(crate) fn check_announced(&self, size: &SizeHint) -> Result<(), Rejection> {
        self.allowed(size.lower()).map(|_| ())
    }

    /// Reads the body of a request. `None` if the caller has gone meanwhile.
    pub(crate) async fn read<B>(
        &self,
        body: Pin<&mut B>,
        caller: oneshot::Receiver<()>,
    ) -> Result<Option<Buffered>, Rejection>
    where
        B: Body<Data = Bytes>,
        B::Error: Into<BoxError>,
    {
        match timeout(self.timeout, self.read_all(body, caller)).await {
            Ok(read) => read,
            Err(_) => Err(Rejection::new(
                RejectionCode::RequestTimeout,
                format!(
                    "The request was not performed: its body did not arrive within {:?}. Send it again with \
                     the same key.",
                    self.timeout
                ),
            )),
        }
    }

    async fn read_all<B>(
        &self,
        mut body: Pin<&mut B>,
        mut caller: oneshot::Receiver<()>,
    ) -> Result<Option<Buffered>, Rejection>
    where
        B: Body<Data = Bytes>,
        B::Error: Into<BoxError>,
    {
        let mut trailers = None;
        let mut bytes = self.begin(&body.size_hint())?;
        loop {
            let frame = poll_fn(|cx| match Pin::new(&mut caller).poll(cx) {
                Poll::Ready(_) => Poll::Ready(Err(CallerGone)),
                Poll::Pending => body.as_mut().poll_frame(cx).map(Ok),
            });
            match frame.await {
                Err(CallerGone) => return Ok(None),
                Ok(None) => return Ok(Some(Buffered { data: bytes.into_bytes(), trailers })),
                Ok(Some(Err(error))) => return Err(incomplete(&error.into())),
                Ok(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => self.append(&mut bytes, &data)?,
                    Err(frame) => trailers = frame.into_trailers().ok(),
                },
            }
        }
    }

    /// No room is taken before anything has arrived.
    fn begin(&self, size: &SizeHint) -> Result<CountedBytes, Rejection> {
        let permit = Arc::clone(&self.free).try_acquire_many_owned(0).map_err(|_| overloaded())?;
        let announced = size.upper().and_then(|upper| u32::try_from(upper).ok()).unwrap_or(u32::MAX);
        Ok(CountedBytes { data: Vec::new(), reserved: 0, most: announced.min(self.body_limit), permit })
    }

    /// Room grows with what has arrived: it doubles, but never beyond what was announced.
    fn append(&self, bytes: &mut CountedBytes, data: &[u8]) -> Result<(), Rejection> {
        let length = bytes.data.len() + data.len();
        let needed = self.allowed(length)?;
        if needed > bytes.reserved {
            let reserved = needed.max(bytes.reserved.saturating_mul(2).min(bytes.most));
            let more = Arc::clone(&self.free).try_acquire_many_owned(reserved - bytes.reserved);
            bytes.permit.merge(more.map_err(|_| overloaded())?);
            bytes.reserved = reserved;
        }
        if length > bytes.data.capacity() {
            let capacity = usize::try_from(bytes.reserved).unwrap_or(length);
            bytes.data.reserve_exact(capacity - bytes.data.len());
        }
        bytes.data.extend_from_slice(data);
        Ok(())
    }

    /// The size of a body, if it is within the limit.
    fn allowed(&self, size: impl TryInto<u32>) -> Result<u32, Rejection> {
        size.try_into().ok().filter(|size| *size <= self.body_limit).ok_or_else(|| {
            let limit = self.body_limit;
            let detail = format!("The request was not performed: its body is larger than {limit} bytes.");
            Rejection::new(RejectionCode::RequestTooLarge, detail)
        })
    }
}

struct CallerGone;

/// Bytes that give their room back when the last handle to them is dropped.
struct CountedBytes {
    data: Vec<u8>,
    reserved: u32,
    /// The most that is worth taking in advance.
    most: u32,
    permit: OwnedSemaphorePermit,
}

impl CountedBytes {
    fn into_bytes(self) -> Bytes {
        if self.data.is_empty() { Bytes::new() } else { Bytes::from_owner(self) }
    }
}

impl AsRef<[u8]> for CountedBytes {
    fn as_ref(&self) -> &[u8] {
        &self.data
    }
}

fn overloaded() -> Rejection {
    Rejection::new(
        RejectionCode::Overloaded,
        "The request was not performed: too many requests are being received. Send it again later with the \
         same key.",
    )
}

/// The refusal of a body that ended with an error. A limit outside the layer ends bodies too: such
/// a request must not be sent again.
fn incomplete(error: &BoxError) -> Rejection {
    let mut sources = successors(Some(error.as_ref() as &(dyn Error + 'static)), |error| (*error).source());
    if sources.any(|error| error.is::<LengthLimitError>()) {
        return Rejection::new(
            RejectionCode::RequestTooLarge,
            "The request was not performed: its body is larger than allowed.",
        );
    }
    Rejection::new(
        RejectionCode::RequestIncomplete,
        format!(
            "The request was not performed: its body broke off ({error}). Send it again with the same key."
        ),
    )
}

/// The collected part of a response's body.
pub(crate) enum Collected<B> {
    /// All of it.
    Whole(Buffered),
    /// A part, because it is too large, too slow or endless: the frames that were read, and the
    /// rest.
    Partial(VecDeque<Frame<Bytes>>, Pin<Box<B>>),
    /// It broke off.
    Broken(BoxError),
}

/// Collects the body of a response.
pub(crate) async fn collect<B>(body: B, limit: usize, time_limit: Duration) -> Collected<B>
where
    B: Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    let deadline = Instant::now() + time_limit;
    let mut body = Box::pin(body);
    let (mut frames, mut length) = (VecDeque::new(), 0);
    if body.size_hint().lower() > limit as u64 {
        return Collected::Partial(frames, body);
    }
    while let Ok(next) = timeout_at(deadline, poll_fn(|cx| body.as_mut().poll_frame(cx))).await {
        match next {
            None => return Collected::Whole(join(frames, length)),
            Some(Err(error)) => return Collected::Broken(error.into()),
            Some(Ok(frame)) => {
                length += frame.data_ref().map_or(0, Bytes::len);
                let is_last = frame.is_trailers() || body.is_end_stream();
                frames.push_back(frame);
                if length > limit {
                    break;
                }
                // A body need not say again that it has ended.
                if is_last {
                    return Collected::Whole(join(frames, length));
                }
            }
        }
    }
    Collected::Partial(frames, body)
}

fn join(frames: VecDeque<Frame<Bytes>>, length: usize) -> Buffered {
    let mut whole = Buffered::default();
    let mut chunks = Vec::with_capacity(frames.len());
    for frame in frames {
        match frame.into_data() {
            Ok(data) => chunks.push(data),
            Err(frame) => whole.trailers = frame.into_trailers().ok(),
        }
    }
    whole.data = match <[Bytes; 1]>::try_from(chunks) {
        Ok([only]) => only,
        Err(chunks) => chunks
            .iter()
            .fold(Vec::with_capacity(length), |mut all, chunk| {
                all.extend_from_slice(chunk);
                all
            })
            .into(),
    };
    whole
}

const BUFFER_LIMIT: usize = 64 * 1024 * 1024;
