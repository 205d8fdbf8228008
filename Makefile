# Dalgu: `make` alone explains every target.
# HOSTS: how many hosts the lab has. PROFILE: the cargo profile the daemons are built with; `dev` is made soonest and
# shared with the tests, `lab` is optimised, for what measures or runs for long.

HOSTS   ?= 3
PROFILE ?= dev
SHELL   := /bin/bash

target  := $(or $(CARGO_TARGET_DIR),$(CURDIR)/target)
bin      = $(target)/$(if $(filter dev,$(PROFILE)),debug,$(PROFILE))
# The lab makes network namespaces; everything else runs as the caller.
as_root := $(if $(filter 0,$(shell id -u)),,sudo --preserve-env=DALGU_LAB_ID)

.DEFAULT_GOAL := help
.PHONY: help setup build programs lab lab-env lab-status lab-down lab-image tour-image demo test properties samples chaos fleet fuzz bench-lifecycle bench-provision bench-scale bench-placement bench-planner deb deb-check fmt lint advisories

help: ## Explain the targets
	@echo "Dalgu: a site's servers as one field of virtual machines."
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo
	@echo "Start with \`make demo\`. By hand: \`make lab HOSTS=3\`, then eval \"\$$(make -s lab-env)\", then \`dalgu host list\`."

setup: ## Install the packages and tools that building and the lab need (Debian, Ubuntu)
	@bash tests/lab/setup.sh

build: setup ## Build what is installed: target/release/dalgu, dalgu-agent and dalgu-controller
	@cargo build --release -p dalgu -p dalgu-agent -p dalgu-controller

deb: build ## Make Debian packages of what is installed, judged by lintian: target/debian/*.deb
	@bash tests/lab/setup.sh packages
	@bash systemd/deb/build.sh

deb-check: deb ## Install, upgrade and remove the packages in a new root of this machine's release (from the distribution's mirror)
	@$(as_root) bash systemd/deb/check.sh

# What the targets below run. Of the whole workspace, so that the tests need no other build; it has the tests' switches in it.
programs: setup
	@cargo build --workspace $(addprefix --bin ,$(DAEMONS) $(PROGRAMS)) --profile $(PROFILE)

DAEMONS  := dalgu dalgu-agent dalgu-controller
PROGRAMS  = lab lab-reaper demo
chaos:           PROGRAMS = lab lab-reaper chaos
bench-lifecycle: PROGRAMS = lab lab-reaper bench-lifecycle
bench-provision: PROGRAMS = lab lab-reaper bench-provision
bench-scale:     PROGRAMS = bench-scale
bench-placement: PROGRAMS = bench-placement
bench-planner:   PROGRAMS = bench-planner
fleet:           PROGRAMS = fleet
# What measures, or runs for long, is optimised.
chaos bench-lifecycle bench-provision bench-scale bench-placement bench-planner: PROFILE = lab
# It runs the programs in itself, for minutes that the whole optimisation shortens by a tenth.
fleet: PROFILE = release
fleet: DAEMONS =

lab: programs ## Bring up HOSTS=3 real libvirt hosts here, with a controller and agents
	@$(as_root) $(bin)/lab up --hosts $(HOSTS)
	@echo
	@echo "In this shell:  eval \"\$$(make -s lab-env)\""
	@echo "Then try:       dalgu host list"
	@echo "                grpcurl \$$DALGU_LAB_ENDPOINT list"
	@echo "                virsh-h1 list --all;  on-h2 ip address"
	@echo "At the end:     make lab-down"

lab-env: ## Print the exports that put the lab into a shell: eval "$(make -s lab-env)"
	@$(bin)/lab env

lab-status: ## Show what runs in the lab
	@$(as_root) $(bin)/lab status

lab-down: ## Remove every trace of the lab, also of one that crashed
	@test -x $(bin)/lab || cargo build --workspace --bin lab --profile $(PROFILE)
	@$(as_root) $(bin)/lab down

lab-image: setup ## Make a disk image of this machine's release with cloud-init and SSH, from its packages: target/lab-image/image.qcow2
	@$(as_root) bash tests/lab/image/build.sh $(target)/lab-image/image.qcow2

tour-image: programs lab-image ## Make VMs from that image on real hosts: imported once, addresses by DHCP, SSH keys and user data by cloud-init (ten minutes)
	@$(if $(as_root),CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="$(as_root)") cargo test --workspace --test debian -- --ignored --nocapture

demo: programs ## Show it all on real guests, every claim checked (half a minute; KEEP=1 leaves the lab up)
	@$(as_root) $(bin)/demo $(if $(filter-out 0 no,$(KEEP)),--keep)

test: ## Check format and lints, then run every test, the lab's end-to-end tests too
	@bash tests/lab/setup.sh checks
	@bash tests/run.sh

properties: ## Try CASES=100000 random sites against each property of placement, of plans and of the power of hosts (an hour)
	@bash tests/lab/setup.sh checks
	@PROPTEST_CASES=$(or $(CASES),100000) cargo nextest run --profile long --cargo-profile lab -p dalgu-controller \
		-E 'test(/^(placement|planner|power|state::fleet)::/)'

fuzz: setup ## Give each fuzz target MINUTES=30 (TARGET=x for one; KEEP=1 keeps what was found in tests/fuzz/corpus)
	@KEEP=$(KEEP) PROFILE=fuzz bash tests/fuzz/run.sh $$(( $(or $(MINUTES),30) * 60 )) $(TARGET)

bench-lifecycle: programs ## Measure Dalgu against virsh on the same hosts: target/bench/lifecycle.json
	@$(as_root) $(bin)/bench-lifecycle

bench-provision: programs ## Measure VMs made from images against qemu-img and virsh by hand: target/bench/provision.json
	@$(as_root) $(bin)/bench-provision

bench-scale: programs ## Measure a controller with 2,000 hosts and 20,000 VMs, killed and overloaded: target/bench/scale.json
	@$(bin)/bench-scale

bench-placement: programs ## Measure how fast placement decides, up to 100,000 hosts, and how well it packs a trace (DATA=dir); NOVA=program is run beside: target/bench/placement.json
	@$(bin)/bench-placement $(if $(NOVA),--nova $(NOVA)) $(if $(DATA),--trace $(DATA)/$(or $(TRACE),azure_v1_dev.csv.gz))

bench-planner: programs ## Measure plans: rebalancing beside hbal (its figures, or itself with HBAL=program), 5,000 nodes, rolling maintenance of 1,000 hosts, and with DATA=dir consolidation of a PlanetLab day: target/bench/planner.json
	@$(bin)/bench-planner $(if $(HBAL),--hbal $(HBAL)) $(if $(DATA),--planetlab $(DATA)/$(or $(DAY),planetlab-20110303.tar.xz))

chaos: programs ## Random operations and faults on real hosts, judged by an independent eye: MINUTES=20, SEED=N, target/chaos/report.json
	@$(as_root) $(bin)/chaos --minutes $(or $(MINUTES),20) $(if $(SEED),--seed $(SEED))

fleet: programs ## The programs on a simulated site: 10,000 seeds of 1,000 faults, the step matrix, each rule turned off; then 300 seeds with the real network stack and files: target/fleet/report.json
	@$(bin)/fleet campaign

samples: ## Record what this version says and stores, for the tests of later ones: tests/samples/VERSION (NAME=x for another name)
	@cargo run -q -p dalgu-tests --bin record-samples -- $(NAME)

fmt: ## Format the code
	@cargo fmt --all

lint: setup ## Check format and lints
	@cargo fmt --all --check
	@cargo clippy --workspace --all-targets -- --deny warnings

advisories: ## Ask whether a dependency has a known flaw (needs the network, and cargo-deny: `make test` installs it)
	@cargo deny --locked check advisories
