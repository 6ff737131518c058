# pg_redrive: build with PGXS.
#   make                      build
#   make install              install (DESTDIR= stages it elsewhere)
#   make installcheck         run the installed extension's tests on private servers (not as root)
#   make DEV=1                warnings are errors, our assertions are on
#   make bench, make demo     see bench/ and scripts/demo
#   make nightly              faults at 200 random moments instead of 20
#   make dist, make package   the PGXN distribution, and Debian packages, in dist/
# scripts/check does all of it in a scratch directory and installs nothing.

EXTENSION   = pg_redrive
MODULE_big  = pg_redrive

# the control file is the one source of the version (VERSION itself is the server's)
EXTVERSION := $(shell sed -n "s/^default_version *= *'\(.*\)'.*/\1/p" $(EXTENSION).control)

OBJS        = $(patsubst %.c,%.o,$(sort $(wildcard src/*.c src/*/*.c)))

# the parts of the install script are numbered: the number is the order
SQL_PARTS   = $(sort $(wildcard sql/[0-9]*.sql))
# what was released stays as it was; the script from each release that sql/upgrade/ knows of is made anew
UPGRADES    = $(patsubst sql/upgrade/%.sql,$(EXTENSION)--%.sql,$(wildcard sql/upgrade/*--$(EXTVERSION).sql))
DATA_built  = $(EXTENSION)--$(EXTVERSION).sql $(UPGRADES)
DATA        = $(wildcard sql/releases/$(EXTENSION)--*.sql)
# beside psql
SCRIPTS     = scripts/redrive-top
EXTRA_CLEAN = $(DATA_built) tmp_check tmp_layout tmp_regress tmp_isolation

# PGXS adds -I for the server's headers too; -isystem keeps warnings about them quiet
PG_CPPFLAGS = -I$(srcdir)/src -isystem $(shell $(PG_CONFIG) --includedir-server) \
              -DREDRIVE_VERSION='"$(EXTVERSION)"'
SHLIB_LINK  = -lcurl
PG_CFLAGS   = -Wextra -Wno-unused-parameter -Wno-sign-compare -Wno-missing-field-initializers

ifdef DEV
WERROR      = -Werror
PG_CPPFLAGS += -DUSE_ASSERT_CHECKING
PG_CFLAGS   += -Wshadow -Wstrict-prototypes -Wold-style-definition -Wduplicated-cond \
               -Wlogical-op -Wwrite-strings -Wunused-macros
endif
PG_CFLAGS   += $(WERROR)

# no bitcode: nothing here is worth inlining into a query, and clang is not needed.
# Makefile.global sets with_llvm, so only an override holds.
override with_llvm = no

# pg_regress and pg_isolation_regress look for sql, specs and expected in one folder
LAYOUT         = $(CURDIR)/tmp_layout
TEST_OPTS      = --inputdir=$(LAYOUT) --temp-config=$(CURDIR)/test/regress.conf \
                 --no-locale --encoding=UTF8 --load-extension=$(EXTENSION)
REGRESS        = $(patsubst test/sql/%.sql,%,$(sort $(wildcard test/sql/*.sql)))
REGRESS_OPTS   = $(TEST_OPTS) --temp-instance=$(CURDIR)/tmp_regress/data --outputdir=$(CURDIR)/tmp_regress
REGRESS_PREP   = layout
ISOLATION      = $(patsubst test/specs/%.spec,%,$(sort $(wildcard test/specs/*.spec)))
ISOLATION_OPTS = $(TEST_OPTS) --temp-instance=$(CURDIR)/tmp_isolation/data --outputdir=$(CURDIR)/tmp_isolation
TAP_TESTS      = $(if $(wildcard test/t/*.pl),1)
PROVE_TESTS    = test/t/*.pl
# pg_cron can be created in its own database and in this one only
override ISOLATION_TESTDB = contrib_regression

PG_CONFIG  ?= pg_config
PGXS       := $(shell $(PG_CONFIG) --pgxs)
include $(PGXS)

PROVE_FLAGS += -I $(CURDIR)/test/perl

$(EXTENSION)--$(EXTVERSION).sql: $(SQL_PARTS) $(EXTENSION).control
	cat $(SQL_PARTS) > $@

$(UPGRADES): $(EXTENSION)--%--$(EXTVERSION).sql: sql/upgrade/%--$(EXTVERSION).sql scripts/upgrade-script $(SQL_PARTS)
	scripts/upgrade-script $* $(EXTVERSION) > $@

# PGXS does not track headers
$(OBJS): $(wildcard src/*.h src/*/*.h) $(EXTENSION).control

.PHONY: layout bench demo nightly dist package
layout:
	rm -rf tmp_layout tmp_regress tmp_isolation
	mkdir tmp_layout tmp_regress tmp_isolation
	ln -s ../test/sql ../test/specs ../expected tmp_layout

bench:
	bench/run

demo:
	scripts/demo

nightly:
	scripts/nightly

dist:
	scripts/dist

package:
	scripts/package
