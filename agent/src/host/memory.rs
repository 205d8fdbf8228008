//! Memory of the host, from /proc/meminfo and /sys/kernel/mm/hugepages.
//!
//! /proc/meminfo is parsed here and not by the procfs crate, which multiplies without a look at the result.

use dalgu_proto::host::{HugePages, Memory};

use super::{Error, Root};

const MEMINFO: &str = "proc/meminfo";

/// Use of memory now.
pub(super) fn usage(root: &Root) -> Result<Memory, Error> {
    let text = root.text(MEMINFO)?;
    let must = |key| bytes(&text, key).ok_or_else(|| root.malformed(MEMINFO, key));
    let free_bytes = must("MemFree")?;
    Ok(Memory {
        total_bytes: must("MemTotal")?,
        free_bytes,
        // Kernels before 3.14 do not estimate it; this is what they could at least give.
        available_bytes: bytes(&text, "MemAvailable").unwrap_or(free_bytes),
        cached_bytes: must("Cached")?,
        buffers_bytes: must("Buffers")?,
        swap_total_bytes: must("SwapTotal")?,
        swap_free_bytes: must("SwapFree")?,
        huge_pages: huge_pages(root),
    })
}

/// All memory there is.
pub(super) fn total_bytes(root: &Root) -> Result<u64, Error> {
    bytes(&root.text(MEMINFO)?, "MemTotal").ok_or_else(|| root.malformed(MEMINFO, "MemTotal"))
}

/// `MemTotal:       24684084 kB`
fn bytes(meminfo: &str, key: &str) -> Option<u64> {
    let value = meminfo
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    let kib: u64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// Huge pages by size, smallest first; sizes of which none are set aside too.
pub(super) fn huge_pages(root: &Root) -> Vec<HugePages> {
    pages_in(root, "sys/kernel/mm/hugepages")
}

/// The same of one NUMA node, by the directory that tells of them.
pub(super) fn pages_in(root: &Root, directory: &str) -> Vec<HugePages> {
    let mut sizes: Vec<_> = root
        .names(directory)
        .iter()
        .filter_map(|name| {
            let kib: u64 = name
                .strip_prefix("hugepages-")?
                .strip_suffix("kB")?
                .parse()
                .ok()?;
            Some(HugePages {
                page_size_bytes: kib.checked_mul(1024)?,
                total: root.number(format!("{directory}/{name}/nr_hugepages"))?,
                free: root.number(format!("{directory}/{name}/free_hugepages"))?,
            })
        })
        .collect();
    sizes.sort_by_key(|pages| pages.page_size_bytes);
    sizes
}

#[cfg(test)]
mod tests {
    use super::{
        super::root::fake::{MEMINFO, Tree},
        *,
    };

    #[test]
    fn memory_is_read_in_bytes() {
        let tree = Tree::new();
        tree.write("proc/meminfo", MEMINFO);
        let memory = usage(&tree.root()).unwrap();
        assert_eq!(memory.total_bytes, 24_684_084 * 1024);
        assert_eq!(memory.available_bytes, 24_302_616 * 1024);
        assert_eq!(
            (memory.swap_total_bytes, memory.swap_free_bytes),
            (1 << 30, 1 << 29)
        );
        assert_eq!(memory.huge_pages, []);
    }

    #[test]
    fn a_value_that_is_missing_or_beyond_all_bounds_is_an_error_that_names_it() {
        let tree = Tree::new();
        for (from, to) in [
            ("SwapFree:", "SwapFee:"),
            ("24684084 kB", "18446744073709551615 kB"),
        ] {
            tree.write("proc/meminfo", &MEMINFO.replace(from, to));
            let error = usage(&tree.root()).unwrap_err();
            assert!(error.to_string().contains("proc/meminfo"), "{error}");
        }
        assert!(total_bytes(&tree.root()).is_err());
    }

    #[test]
    fn huge_pages_come_smallest_first_and_odd_names_are_left_out() {
        let tree = Tree::new();
        for (size, total, free) in [("1048576", "4\n", "1\n"), ("2048", "512\n", "512\n")] {
            tree.write(
                &format!("sys/kernel/mm/hugepages/hugepages-{size}kB/nr_hugepages"),
                total,
            );
            tree.write(
                &format!("sys/kernel/mm/hugepages/hugepages-{size}kB/free_hugepages"),
                free,
            );
        }
        tree.write("sys/kernel/mm/hugepages/hugepages-xkB/nr_hugepages", "1");
        assert_eq!(
            huge_pages(&tree.root()),
            [
                HugePages {
                    page_size_bytes: 2 << 20,
                    total: 512,
                    free: 512
                },
                HugePages {
                    page_size_bytes: 1 << 30,
                    total: 4,
                    free: 1
                },
            ]
        );
    }
}
