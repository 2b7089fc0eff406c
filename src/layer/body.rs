//! Bodies of requests and responses as they pass the layer.

use std::{
    collections::VecDeque,
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use pin_project_lite::pin_project;

use crate::layer::reach::Reach;

macro_rules! public_body {
    ($(#[$doc:meta])* $name:ident) => {
        pin_project! {
            $(#[$doc])*
            pub struct $name<B> {
                #[pin]
                inner: Inner<B>,
            }
        }

        impl<B> $name<B> {
            pub(crate) fn passed(body: B) -> Self {
                Self { inner: Inner::Passed { body } }
            }

            pub(crate) fn buffered(data: Bytes, trailers: Option<HeaderMap>) -> Self {
                let data = Some(data).filter(|data| !data.is_empty());
                Self { inner: Inner::Buffered { data, trailers, reach: None } }
            }
        }

        impl<B: Body<Data = Bytes>> Body for $name<B> {
            type Data = Bytes;
            type Error = B::Error;

            fn poll_frame(
                self: Pin<&mut Self>,
                cx: &mut Context<'_>,
            ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
                self.project().inner.poll_frame(cx)
            }

            fn is_end_stream(&self) -> bool {
                self.inner.is_end_stream()
            }

            fn size_hint(&self) -> SizeHint {
                self.inner.size_hint()
            }
        }

        impl<B> Default for $name<B> {
            fn default() -> Self {
                Self::buffered(Bytes::new(), None)
            }
        }

        impl<B> fmt::Debug for $name<B> {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.debug_struct(stringify!($name)).finish_non_exhaustive()
            }
        }
    };
}

public_body! {
    /// Body of the inner service's requests: the client's as it comes, or the buffered bytes of a
    /// request with a key.
    RequestBody
}

public_body! {
    /// Body of the layer's responses: the inner service's as it comes, or buffered bytes.
    ResponseBody
}

impl<B> RequestBody<B> {
    /// There are buffered bytes.
    pub(crate) fn has_data(&self) -> bool {
        matches!(&self.inner, Inner::Buffered { data: Some(_), .. })
    }

    /// Notes in `reach` that the body is read.
    pub(crate) fn watched_by(&mut self, watcher: Arc<Reach>) {
        if let Inner::Buffered { reach, .. } = &mut self.inner {
            *reach = Some(watcher);
        }
    }
}

impl<B> ResponseBody<B> {
    /// A body of which some frames were read already.
    pub(crate) fn resumed(frames: VecDeque<Frame<Bytes>>, rest: Pin<Box<B>>) -> Self {
        Self { inner: Inner::Resumed { frames, rest } }
    }
}

pin_project! {
    #[project = Projected]
    enum Inner<B> {
        Passed { #[pin] body: B },
        Buffered { data: Option<Bytes>, trailers: Option<HeaderMap>, reach: Option<Arc<Reach>> },
        Resumed { frames: VecDeque<Frame<Bytes>>, rest: Pin<Box<B>> },
    }
}

impl<B: Body<Data = Bytes>> Inner<B> {
    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        match self.project() {
            Projected::Passed { body } => body.poll_frame(cx),
            Projected::Buffered { data, trailers, reach } => {
                if let Some(reach) = reach {
                    reach.note_read();
                }
                let frame = data.take().map(Frame::data).or_else(|| trailers.take().map(Frame::trailers));
                Poll::Ready(frame.map(Ok))
            }
            Projected::Resumed { frames, rest } => match frames.pop_front() {
                Some(frame) => Poll::Ready(Some(Ok(frame))),
                None => rest.as_mut().poll_frame(cx),
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Passed { body } => body.is_end_stream(),
            Self::Buffered { data, trailers, .. } => data.is_none() && trailers.is_none(),
            Self::Resumed { frames, rest } => frames.is_empty() && rest.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Passed { body } => body.size_hint(),
            Self::Buffered { data, trailers, .. } => {
                let length = data.as_ref().map_or(0, |data| data.len() as u64);
                let mut hint = SizeHint::new();
                hint.set_lower(length);
                // A server sends trailers only after a body whose length it does not announce.
                if trailers.is_none() {
                    hint.set_upper(length);
                }
                hint
            }
            Self::Resumed { frames, rest } => {
                let read =
                    frames.iter().filter_map(Frame::data_ref).map(|data| data.len() as u64).sum::<u64>();
                let rest = rest.size_hint();
                let mut hint = SizeHint::new();
                hint.set_lower(rest.lower() + read);
                if let Some(upper) = rest.upper() {
                    hint.set_upper(upper + read);
                }
                hint
            }
        }
    }
}
