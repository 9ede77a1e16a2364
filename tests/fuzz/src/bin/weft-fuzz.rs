//! What libFuzzer drives: `WEFT_FUZZ` names the target. With `WEFT_FUZZ_SEEDS` it only writes the target's seeds into
//! that directory. `tests/fuzz/run` builds and starts it.

#![no_main]

use std::path::Path;
use std::sync::LazyLock;

use weft_fuzz::{TARGETS, Target};

static TARGET: LazyLock<&Target> = LazyLock::new(|| {
    let name = std::env::var("WEFT_FUZZ").unwrap_or_default();
    Target::named(&name).unwrap_or_else(|| {
        let names: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
        eprintln!("WEFT_FUZZ is \"{name}\", and none of: {}", names.join(" "));
        std::process::exit(2);
    })
});

fn write_seeds(dir: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(dir)?;
    for (number, seed) in (TARGET.seeds)().iter().enumerate() {
        std::fs::write(dir.join(format!("seed-{number:03}")), seed)?;
    }
    Ok(())
}

libfuzzer_sys::fuzz_target!(
    init: {
        LazyLock::force(&TARGET);
        if let Some(dir) = std::env::var_os("WEFT_FUZZ_SEEDS") {
            let code = match write_seeds(Path::new(&dir)) {
                Ok(()) => 0,
                Err(error) => {
                    eprintln!("can't write seeds: {error}");
                    1
                }
            };
            std::process::exit(code);
        }
    },
    |data: &[u8]| {
        TARGET.run(data);
    }
);
