//! Several pieces in one input: each with its length before it, two octets, big endian. The last takes what there is.

/// Cuts an input into at most `most` pieces.
pub fn cut(mut data: &[u8], most: usize) -> Vec<&[u8]> {
    let mut pieces = Vec::new();
    while let Some((head, rest)) = data.split_first_chunk::<2>() {
        if pieces.len() == most {
            break;
        }
        let length = usize::from(u16::from_be_bytes(*head)).min(rest.len());
        let (piece, rest) = rest.split_at(length);
        pieces.push(piece);
        data = rest;
    }
    pieces
}

/// Puts pieces together.
pub fn join<P: AsRef<[u8]>>(pieces: impl IntoIterator<Item = P>) -> Vec<u8> {
    let mut data = Vec::new();
    for piece in pieces {
        let piece = piece.as_ref();
        let length = u16::try_from(piece.len()).unwrap_or(u16::MAX);
        data.extend_from_slice(&length.to_be_bytes());
        data.extend_from_slice(&piece[..usize::from(length)]);
    }
    data
}

/// Lengths and pieces in front of which stands one octet that says what they are.
pub fn marked(mark: u8, piece: &[u8]) -> Vec<u8> {
    [&[mark], piece].concat()
}
