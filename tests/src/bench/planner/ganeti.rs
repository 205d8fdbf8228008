//! The site that Ganeti's balancer was measured on: 64 processors and 256 GiB a node, twelve VMs for each on average, more of them on the nodes
//! that come first.
//!
//! The recorded figures are of a file that a Python program wrote, with the numbers that Python's generator gives after `seed(7)`. The same
//! generator is here (MT19937 of Matsumoto and Nishimura, 1998), so that it is the same file.

use dalgu_controller::planner::{Host, Load, Rule, Site, Vm};

/// Memory of a node, in MiB.
const MEMORY_MIB: u64 = 262_144;
/// What the node itself takes of it.
const OWN_MIB: u64 = 2048;
/// Processors of a node, and how many virtual ones stand for each at most.
const CPUS: u32 = 64;
const RATIO: u32 = 4;
/// Weights of what is used of the processors, of the memory, and of the number of VMs, as `hbal` has them where it is told of no load:
/// four kinds of load count each VM as one. It divides memory by all there is.
#[expect(clippy::cast_precision_loss, reason = "small")]
pub const WEIGHTS: [f64; 3] = [1.0, (MEMORY_MIB - OWN_MIB) as f64 / MEMORY_MIB as f64, 4.0];

/// The site as a file that Ganeti's programs read: nodes, instances and what their policy allows.
#[must_use]
pub fn text(site: &Site) -> String {
    const POLICY: &str = "|128,1,1024,1,1,1|128,1,1024,1,1,1;65536,16,1048576,16,8,12|diskless,file,sharedfile,plain,blockdev,drbd,rbd,ext,gluster\
                          |4.0|32.0";
    let nodes = (0..site.hosts().len()).map(|node| {
        let used: u64 = site.here(node).iter().map(|vm| site.vms()[*vm].memory_mib).sum();
        let free = MEMORY_MIB - OWN_MIB - used;
        format!("n{node:05}|{MEMORY_MIB}|{OWN_MIB}|{free}|10485760|10485760|{CPUS}|N|uuid-1|1||N|0|1|1.0")
    });
    let instances = site.vms().iter().zip(0..).map(|(vm, number): (_, u32)| {
        let (memory, vcpus, node) = (vm.memory_mib, vm.vcpus, vm.host);
        format!("i{number}|{memory}|51200|{vcpus}|running|Y|n{node:05}||rbd||1|1|N")
    });
    let (nodes, instances): (Vec<_>, Vec<_>) = (nodes.collect(), instances.collect());
    let sections = [
        "g1|uuid-1|preferred||".to_owned(),
        nodes.join("\n"),
        instances.join("\n"),
        String::new(),
        format!("{POLICY}\ng1{POLICY}"),
    ];
    sections.join("\n\n") + "\n"
}

/// A site of so many nodes.
#[must_use]
pub fn site(nodes: usize) -> Site {
    let mut random = Twister::new(7);
    let mut free = vec![(MEMORY_MIB - OWN_MIB, 0_u32); nodes];
    let mut vms = Vec::new();
    for _ in 0..nodes * 12 {
        let (memory_mib, vcpus) = size(&mut random);
        for _ in 0..50 {
            let at = skewed(nodes, random.next());
            let (left, reserved) = &mut free[at];
            if *left > memory_mib + 4096 && *reserved + vcpus <= 200 {
                *left -= memory_mib;
                *reserved += vcpus;
                vms.push(vm(at, vcpus, memory_mib));
                break;
            }
        }
    }
    let host = Host {
        vcpus: CPUS * RATIO,
        memory_mib: MEMORY_MIB - OWN_MIB,
        cpus: CPUS.into(),
        core: 1.0,
        cost: 1.0,
        open: true,
        ..Host::default()
    };
    Site::new(vec![host; nodes], vms, vec![Rule::new(nodes, |_| true)])
}

fn size(random: &mut Twister) -> (u64, u32) {
    let sizes = [(2048, 1), (4096, 2), (8192, 2), (16_384, 4), (32_768, 8)];
    let drawn = random.next() * 100.0;
    let place = [30.0, 60.0, 80.0, 95.0]
        .iter()
        .filter(|limit| drawn >= **limit)
        .count();
    sizes[place]
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "from 0 to the number of nodes"
)]
fn skewed(nodes: usize, random: f64) -> usize {
    (nodes as f64 * random.powf(1.3)) as usize
}

/// What is reserved of the processors counts as used.
fn vm(host: usize, vcpus: u32, memory_mib: u64) -> Vm {
    let cpus = f64::from(vcpus);
    Vm {
        host,
        vcpus,
        memory_mib,
        load: Load {
            mean: cpus,
            variance: 0.0,
            next: cpus,
        },
        transfer_mib: memory_mib,
        ..Vm::default()
    }
}

/// Words of its state.
const WORDS: usize = 624;

struct Twister {
    words: [u32; WORDS],
    at: usize,
}

impl Twister {
    /// As Python seeds it with a number of one word.
    fn new(seed: u32) -> Self {
        let mut words = [0_u32; WORDS];
        words[0] = 19_650_218;
        for i in 1..WORDS {
            words[i] = mixed(words[i - 1])
                .wrapping_mul(1_812_433_253)
                .wrapping_add(low(i));
        }
        let mut i = 1;
        for _ in 0..WORDS {
            words[i] = (words[i] ^ mixed(words[i - 1]).wrapping_mul(1_664_525)).wrapping_add(seed);
            i = following(&mut words, i);
        }
        for _ in 1..WORDS {
            words[i] = (words[i] ^ mixed(words[i - 1]).wrapping_mul(1_566_083_941)).wrapping_sub(low(i));
            i = following(&mut words, i);
        }
        words[0] = 0x8000_0000;
        Self { words, at: WORDS }
    }

    fn word(&mut self) -> u32 {
        if self.at == WORDS {
            for i in 0..WORDS {
                let joined = (self.words[i] & 0x8000_0000) | (self.words[(i + 1) % WORDS] & 0x7fff_ffff);
                let odd = if joined & 1 == 1 { 0x9908_b0df } else { 0 };
                self.words[i] = self.words[(i + 397) % WORDS] ^ (joined >> 1) ^ odd;
            }
            self.at = 0;
        }
        let mut word = self.words[self.at];
        self.at += 1;
        word ^= word >> 11;
        word ^= (word << 7) & 0x9d2c_5680;
        word ^= (word << 15) & 0xefc6_0000;
        word ^ (word >> 18)
    }

    /// From 0 to 1, with 53 bits.
    fn next(&mut self) -> f64 {
        let (high, low) = (self.word() >> 5, self.word() >> 6);
        (f64::from(high) * 67_108_864.0 + f64::from(low)) / 9_007_199_254_740_992.0
    }
}

fn mixed(word: u32) -> u32 {
    word ^ (word >> 30)
}

fn low(i: usize) -> u32 {
    u32::try_from(i).expect("below the number of words")
}

fn following(words: &mut [u32; WORDS], i: usize) -> usize {
    if i + 1 == WORDS {
        words[0] = words[WORDS - 1];
        return 1;
    }
    i + 1
}

#[cfg(test)]
mod tests {
    use dalgu_controller::planner::score;

    use super::*;

    #[test]
    fn the_generator_gives_what_pythons_gives() {
        let mut random = Twister::new(7);
        assert_eq!(random.next(), 0.323_832_764_833_162_37);
        assert_eq!(random.next(), 0.150_849_173_924_501_92);
    }

    #[test]
    fn the_file_for_ganetis_programs_says_where_each_vm_is_and_what_is_free() {
        let text = text(&site(5));
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(
            lines[2],
            "n00000|262144|2048|77824|10485760|10485760|64|N|uuid-1|1||N|0|1|1.0"
        );
        assert_eq!(lines[8], "i0|4096|51200|2|running|Y|n00000||rbd||1|1|N");
        assert_eq!(lines.iter().filter(|line| line.starts_with('i')).count(), 60);
        // Node groups, nodes, instances, tags and policies are apart by an empty line each.
        assert_eq!(text.matches("\n\n").count(), 4);
    }

    #[test]
    fn the_site_has_the_score_that_hbal_prints_for_it() {
        let site = site(50);
        assert_eq!(site.vms().len(), 600);
        assert!((score(&site, WEIGHTS) - 22.128_651_6).abs() < 1e-6);
    }
}
